"""What a user can get wrong is a ValueError that says what was given and what to do, before any forward."""

import dataclasses
import json

import numpy
import pytest
import torch
from helpers import SIZES, tiny_images, tiny_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import BertConfig, BertModel, ViTConfig, ViTForMaskedImageModeling

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    TokenReduceDeiTConfig,
    TokenReduceDeiTForImageClassification,
    TokenReduceViTConfig,
    TokenReduceViTForImageClassification,
    ToMeConfig,
    TopKConfig,
    reduce_tokens,
    restore,
)
from hf_tokenreduce.modeling.methods import METHOD_CLASSES


WRONG_VALUES = [
    (ToMeConfig, {"r": -1}, "-1"),
    (ToMeConfig, {"r": 2.5}, "2.5"),
    (ToMeConfig, {"r": "8"}, "'8'"),
    (ToMeConfig, {"r": [4, -2, 0, 0]}, "-2"),
    (ToMeConfig, {"r": True}, "True"),
    (ToMeConfig, {"r": None}, "None"),
    (ToMeConfig, {"r": (8, 1.5)}, "1.5"),
    (ToMeConfig, {"r": [1, 2, 3, 4], "inflect": 0.5}, "0.5"),
    (ToMeConfig, {"prop_attn": "yes"}, "'yes'"),
    (EViTConfig, {"keep_rate": 0}, "0"),
    (EViTConfig, {"keep_rate": 1.2}, "1.2"),
    (EViTConfig, {"keep_rate": float("nan")}, "nan"),
    (EViTConfig, {"keep_rate": "0.7"}, "0.7"),
    (EViTConfig, {"keep_rate": [0.7, 0.5]}, "2 values for 3 layers"),
    (EViTConfig, {"layers": (3, 3)}, r"\[3, 3\]"),
    (EViTConfig, {"layers": (-1,)}, "-1"),
    (EViTConfig, {"layers": 3}, "3"),
    (EViTConfig, {"layers": (1.0,)}, "1.0"),
    (EViTConfig, {"layers": {3, 6, 9}}, "3, 6, 9|9, 3, 6"),
    (EViTConfig, {"keep_rate": torch.tensor(0.7)}, "0.7"),
    (ToMeConfig, {"r": torch.tensor(4)}, "4"),
    (EViTConfig, {"fuse": 1}, "1"),
    (TopKConfig, {"keep_rate": -0.1}, "-0.1"),
    (BATConfig, {"keep_rate": 0}, "0"),
    (BATConfig, {"cluster_share": 1.1}, "1.1"),
    (BATConfig, {"fuse_share": "half"}, "'half'"),
    (BATConfig, {"prop_attn": 1}, "1"),
    (SiTConfig, {"layers": "5, 8"}, "5, 8"),
    (SiTConfig, {"keep_rate": [0.5, 0.0, 0.5]}, "0.0"),
    (DLViTConfig, {"threshold": 2}, "2"),
    (DLViTConfig, {"keep_rate": 0.0}, "0.0"),
    (DLViTConfig, {"keep_rate": [0.5]}, r"\[0.5\]"),
    (DLViTConfig, {"hidden_size": 0}, "0"),
    (DLViTConfig, {"hidden_size": 10**12}, "from 1 to 65536"),
    (ATSConfig, {"num_tokens": 10**12}, "from 1 to 65536"),
    (DLViTConfig, {"trained": None}, "None"),
    (DLViTConfig, {"max_tokens": [50]}, r"\[50\]"),
    (DLViTConfig, {"keep_rate": 0.5, "max_tokens": 50}, "0.5.*50"),
]

KNOWN = ", ".join(sorted(METHOD_CLASSES))
UNFIT = [
    (EViTConfig(layers=(1, 4)), "no layer 4 in a model of 4 layers.*end at 3"),
    (TopKConfig(layers=(12,)), "no layer 12"),
    (ToMeConfig(r=[1, 2, 3]), "3 values for 4 layers"),
    (BATConfig(), "no layer 6"),
    (SiTConfig(layers=(2, 1)), r"ascending order.*\[2, 1\]"),
    ({"method": "dlvit", "max_tokens": 0}, "max_tokens.*0"),
    ({"method": "tomee"}, "'tomee'.*" + KNOWN),
    ({"method": ["tome"]}, "tome.*" + KNOWN),
    ({"method": "tome", 1: 2, "a": 3}, "1, 'a'.*r, prop_attn"),
    ({"r": 8}, "None.*" + KNOWN),
    ({"method": "tome", "rr": 8}, "'rr'.*r, prop_attn"),
    ({"method": "evit", "keep_rate": 2}, "2"),
    (8, "8"),
]


@pytest.mark.parametrize(("config_class", "arguments", "named"), WRONG_VALUES)
def test_wrong_values(config_class, arguments, named):
    with pytest.raises(ValueError, match=f"{config_class.__name__}: .*{named}"):
        config_class(**arguments)


@pytest.mark.parametrize(("reduction", "message"), UNFIT)
def test_what_does_not_fit_is_refused_wherever_it_is_given(reduction, message):
    stock = tiny_model()
    reduced = reduce_tokens(stock, ToMeConfig(r=2))
    expected = reduced(tiny_images()).logits
    for attempt in (
        lambda: TokenReduceViTConfig(**SIZES, reduction=reduction),
        lambda: setattr(reduced.config, "reduction", reduction),
        lambda: reduce_tokens(stock, reduction),
        lambda: reduce_tokens(reduced, reduction),
        lambda: reduced.set_reduction(reduction),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert torch.equal(reduced(tiny_images()).logits, expected)


@pytest.mark.parametrize("reduction", ["tome", ToMeConfig])
def test_a_configuration_holds_a_setting_not_a_methods_name(reduction):
    reduced = reduce_tokens(tiny_model(), ToMeConfig(r=2))
    for attempt in (
        lambda: TokenReduceViTConfig(**SIZES, reduction=reduction),
        lambda: setattr(reduced.config, "reduction", reduction),
        lambda: reduced.set_reduction(reduction),
    ):
        with pytest.raises(ValueError, match=r"'tome'|ToMeConfig"):
            attempt()
    assert reduced.config.reduction == ToMeConfig(r=2)


def test_depth_changed_after_the_reduction_was_set():
    config = TokenReduceViTConfig(**SIZES, reduction=EViTConfig(layers=(1, 3)))
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="no layer 3 in a model of 3 layers"):
        TokenReduceViTForImageClassification(config)


def test_models_we_do_not_have():
    with pytest.raises(ValueError, match=r"BertModel.*ViT, DeiT, .*encoders\.md"):
        reduce_tokens(BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)), ToMeConfig())
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling"):
        reduce_tokens(ViTForMaskedImageModeling(ViTConfig(**SIZES)), ToMeConfig(r=1))
    with pytest.raises(ValueError, match="ViTForImageClassification"):
        restore(tiny_model())


def test_a_checkpoint_of_another_backbone(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "vit")
    tiny_model("deit").save_pretrained(tmp_path / "deit")
    with pytest.raises(ValueError, match=r"'deit'.*TokenReduceViTConfig cannot load"):
        TokenReduceViTForImageClassification.from_pretrained(tmp_path / "deit")
    with pytest.raises(ValueError, match=r"'vit'.*TokenReduceDeiTConfig cannot load"):
        TokenReduceDeiTForImageClassification.from_pretrained(tmp_path / "vit")


def test_wrong_inputs_to_forward():
    model = reduce_tokens(tiny_model(), ToMeConfig(r=2))
    with pytest.raises(ValueError, match=r"48x32, the model takes 32x32.*interpolate_pos_encoding=True"):
        model(torch.randn(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"attention_mask.*restore"):
        model(tiny_images(), attention_mask=torch.ones(3, 65))
    with pytest.raises(ValueError, match="pixel_values"):
        model()
    with pytest.raises(ValueError, match="channel"):
        model(torch.randn(1, 1, 32, 32))
    teacher = reduce_tokens(tiny_model("deit-teacher"), ToMeConfig(r=2))
    with pytest.raises(ValueError, match=r"has no loss.*TokenReduceDeiTForImageClassification\."):
        teacher(tiny_images(), labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("config_class", [TokenReduceViTConfig, TokenReduceDeiTConfig])
def test_the_stock_fields_are_still_validated(config_class):
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_dropout_prob"):
        config_class(hidden_dropout_prob="abc")


@pytest.mark.parametrize("reduction", [ToMeConfig(r=(4, -1.0)), ToMeConfig(r=[1, 2, 0, 4], prop_attn=False)])
def test_configurations_go_through_json(tmp_path, reduction):
    config = TokenReduceViTConfig(**SIZES, reduction=reduction)
    assert config.reduction == reduction
    config.save_pretrained(tmp_path)
    assert TokenReduceViTConfig.from_pretrained(tmp_path).reduction == reduction
    assert TokenReduceViTConfig(**json.loads(config.to_json_string())).reduction == reduction
    assert config.reduction.schedule(4) == TokenReduceViTConfig.from_pretrained(tmp_path).reduction.schedule(4)


def test_layers_and_rates_take_any_sequence():
    config = EViTConfig(keep_rate=[0.5, 0.9], layers=range(1, 3))
    assert config.schedule() == {1: 0.5, 2: 0.9}
    assert EViTConfig(**{k: v for k, v in config.to_dict().items() if k != "method"}) == config
    assert TopKConfig(keep_rate=1, layers=[]).schedule() == {}


def test_a_list_for_two_layers_stays_a_list(tmp_path):
    for values in ([4, 0], [1, 1], [3, 4]):
        config = TokenReduceViTConfig(**{**SIZES, "num_hidden_layers": 2}, reduction=ToMeConfig(r=values))
        config.save_pretrained(tmp_path)
        for reduction in (config.reduction, TokenReduceViTConfig.from_pretrained(tmp_path).reduction):
            assert reduction.schedule(2) == values
            assert dataclasses.replace(reduction, prop_attn=False).schedule(2) == values


def test_a_method_has_one_configuration():
    with pytest.raises(TypeError, match="method name of its own"):

        class Mine(EViTConfig):
            pass

    assert type(TokenReduceViTConfig(reduction=EViTConfig()).reduction) is EViTConfig


def test_the_configuration_of_another_class():
    with pytest.raises(ValueError, match=r"takes a TokenReduceViTConfig, got a ViTConfig.*reduce_tokens"):
        TokenReduceViTForImageClassification(ViTConfig(**SIZES))
    with pytest.raises(ValueError, match=r"takes a TokenReduceViTConfig, got a TokenReduceDeiTConfig"):
        TokenReduceViTForImageClassification(TokenReduceDeiTConfig(**SIZES))
    with pytest.raises(ValueError, match="num_hidden_layers=0"):
        TokenReduceViTForImageClassification(TokenReduceViTConfig(**{**SIZES, "num_hidden_layers": 0}))


def test_tome_schedules():
    assert ToMeConfig(r=8).schedule(4) == [8, 8, 8, 8]
    assert ToMeConfig(r=[3, 0, 1]).schedule(3) == [3, 0, 1]
    assert ToMeConfig(r=(8, -1.0)).schedule(5) == [16, 12, 8, 4, 0]
    assert ToMeConfig(r=(8, 1.0)).schedule(5) == [0, 4, 8, 12, 16]
    assert ToMeConfig(r=(8, 0.5)).schedule(3) == [4, 8, 12]
    assert ToMeConfig(r=(8, -1.0)).schedule(1) == [16]
    assert ToMeConfig(r=(15, 1.0)).schedule(12)[-1] == 30
    assert ToMeConfig(r=(8, -1)) == ToMeConfig(r=8, inflect=-1.0)


def test_numbers_of_numpy_can_be_saved(tmp_path):
    for setting in (
        ATSConfig(layers=numpy.arange(2), num_tokens=numpy.int64(20), max_tokens=numpy.int32(9)),
        LTMPConfig(target=numpy.float32(0.5), merge_threshold=numpy.float64(0.8)),
        BATConfig(keep_rate=numpy.float32(0.5), layers=(1,), cluster_share=numpy.float32(0.1)),
        SiTConfig(keep_rate=numpy.array([0.5]), layers=numpy.array([2])),
        DLViTConfig(keep_rate=numpy.float32(0.5), hidden_size=numpy.int64(7)),
    ):
        config = TokenReduceViTConfig(**SIZES, reduction=setting)
        config.save_pretrained(tmp_path)
        assert TokenReduceViTConfig.from_pretrained(tmp_path).reduction == config.reduction


def test_a_configuration_cannot_be_changed_behind_the_checks():
    with pytest.raises(AttributeError):
        ToMeConfig().r = -5


def test_a_tuple_of_r_leaves_no_second_inflect():
    assert ToMeConfig(r=(8, -1.0), inflect=-1.0) == ToMeConfig(r=(8, -1.0)) == ToMeConfig(r=8, inflect=-1.0)
    with pytest.raises(ValueError, match=r"inflect=0\.5 must be left out"):
        ToMeConfig(r=(8, -1.0), inflect=0.5)
