"""A method and a share of the multiply-adds: what `reduce_tokens` makes of them, and what it refuses."""

import numpy as np
import pytest
import torch
from helpers import SIZES, tiny_images, tiny_model
from PIL import Image
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig
from transformers.utils import logging

from hf_tokenreduce import BATConfig, DLViTConfig, PPTConfig, SiTConfig, ToMeConfig, calibrate, reduce_tokens
from hf_tokenreduce.loading import method_setting
from hf_tokenreduce.methods import METHODS, Method
from hf_tokenreduce.methods.fitting import share_on
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.multiply_adds import even_share


def twelve(**values):
    return tiny_model(num_hidden_layers=12, **values)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs != "labels"])
@pytest.mark.parametrize("by", ["name", "class"])
def test_every_method_keeps_the_share(name, by):
    method, images = METHODS[name], tiny_images(8)
    fitted = method.prepare is not None or method.at_share is None
    asked = name if by == "name" else method.config_class
    model = reduce_tokens(twelve(), asked, share=0.55, **({"images": images} if fitted else {}))
    assert model.config.reduction.method == name
    kept = share_on(model, images)
    if name == "ltmp":  # its search stops beside the target
        assert kept == pytest.approx(0.55, abs=0.03)
    else:
        assert 0.4 < kept <= 0.55


def test_a_sampler_is_fitted_to_images_of_another_size():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 12, "image_size": 32}
    model, images = Dinov2Model(Dinov2Config(**sizes)).eval(), tiny_images(4, size=64)
    reduced = reduce_tokens(model, "ats", share=0.5, images=images)
    more = reduced.config.reduction.num_tokens + 1
    assert share_on(reduced, images) <= 0.5 < share_on(reduce_tokens(model, "ats", num_tokens=more), images)


@pytest.mark.parametrize(("name", "share"), [("ats", 0.42), ("ltmp", 0.6)])
def test_methods_are_fitted_to_images_of_another_size_than_the_models(name, share):
    model, images = twelve(), tiny_images(6, size=48)
    reduced = reduce_tokens(model, name, share=share, images=images)
    assert share_on(reduced, images) == pytest.approx(share, abs=0.03)
    counts = reduced(images, interpolate_pos_encoding=True).token_counts
    assert counts[:, 0].max() <= 145 and counts[:, -1].max() < 145
    if name == "ltmp":
        assert calibrate(reduced, images, 0.8) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("name", ["tome", "topk", "ppt"])
def test_the_share_is_that_of_the_images_that_come(name, caplog):
    """DINOv2's configuration says 518 pixels, and its image processor makes 224."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**{**SIZES, "num_hidden_layers": 12, "image_size": 128})).eval()
    images = tiny_images(2, size=64)
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    kept = share_on(reduce_tokens(model, name, share=0.6, image_processor=processor), images)
    assert kept == pytest.approx(0.6, abs=0.02)
    assert "pass image_processor" not in caplog.text
    logging.enable_propagation()
    assert share_on(reduce_tokens(model, name, share=0.6), images) != pytest.approx(0.6, abs=0.02)
    assert "images of 128 x 128 pixels, the size in the configuration" in caplog.text
    logging.disable_propagation()


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8])
def test_ppt_reduces_in_its_own_layers(share):
    facts = facts_of(ViTConfig())
    setting = PPTConfig.for_budget(facts, share)
    assert setting.layers == (3, 6, 9) and even_share(setting, facts) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", ["ltmp", "sit"])
def test_the_model_that_is_given_keeps_what_it_has_learned(name):
    first = reduce_tokens(twelve(), name, share=0.7, images=tiny_images(4))
    before = {key: value.clone() for key, value in first.state_dict().items()}
    torch.manual_seed(5)
    second = reduce_tokens(first, name, share=0.7, images=torch.randn(6, 3, 32, 32))
    assert second.config.reduction == first.config.reduction
    assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in second.state_dict().items())


@pytest.mark.parametrize(
    ("depth", "share", "layers"),
    [
        (12, 0.8, (5,)),
        (12, 0.65, (4,)),
        (12, 0.55, (3,)),
        (12, 0.45, (2,)),
        (12, 0.28, (0, 3)),
        (24, 0.65, (9,)),
        (24, 0.2, (0, 6)),
        (4, 0.7, (0,)),
    ],
)
def test_one_network_of_sit_keeps_as_large_a_part_as_the_layers_before_it(depth, share, layers):
    """Shares for which it would keep less than a quarter of the tokens have two networks."""
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=depth)
    setting = method_setting(config, "sit", share)
    assert setting.layers == layers and setting.keep_rate >= 0.25
    if len(layers) == 1:
        assert setting.keep_rate >= (layers[0] + 1) / depth
        later = SiTConfig.for_budget(config, share, layers=(layers[0] + 1,))
        assert later.keep_rate < max((layers[0] + 2) / depth, 0.25)
    assert share - 0.01 < even_share(setting, config) <= share
    chosen = method_setting(config, "sit", 0.6, {"layers": (1, 2)})
    assert chosen.layers == (1, 2)


PIXELS = tiny_images(2)
PICTURE = Image.new("RGB", (40, 40))
REFUSED = [
    (("tome",), {"share": 0}, "share must be the share of multiply-adds"),
    (("tome",), {"share": float("nan")}, "share must be the share of multiply-adds"),
    (("tome",), {"share": "0.5"}, "share must be the share of multiply-adds"),
    (("tome",), {"share": 0.01}, "cannot be reached"),
    (("tome",), {"share": 0.5, "r": 4}, "A share of 0.5 decides r"),
    (("tome",), {"share": 0.5, "images": PIXELS}, "needs no images"),
    (("tome",), {"images": PIXELS}, "learns nothing from images"),
    (("tome",), {"share": 0.5, "rr": 4}, "ToMeConfig has no rr"),
    (("ats",), {"share": 0.5}, "Pass images="),
    (("ats",), {"share": 0.5, "images": PIXELS, "num_tokens": 9}, "decides num_tokens"),
    (("ats",), {"share": 0.5, "images": PIXELS, "foo": 9}, "ATSConfig has no foo"),
    (("ats",), {"share": 0.5, "images": PIXELS[0]}, "must be pixel values"),
    (("ats",), {"share": 0.5, "images": PIXELS[:0]}, "must be pixel values"),
    (("ats",), {"share": 0.01, "images": PIXELS}, "cannot be reached"),
    (("ltmp",), {"share": 0.5}, "Pass images="),
    (("ltmp",), {"share": 0.5, "images": [PICTURE]}, "must be a folder or pixel values, got a list"),
    (("ltmp",), {"share": 0.5, "images": "no/such/folder"}, "No images in"),
    (("dlvit",), {"share": 0.5}, "its filter is not trained"),
    (("ppt",), {"share": 0.6, "layers": []}, "layers is empty"),
    (("ppt",), {"share": 0.6, "layers": [-1]}, "layers must hold 0-based layer indices"),
    (("tome",), {"share": 0.6, "inflect": -0.5}, "so leave inflect out"),
    (("tomme",), {"share": 0.5}, "no method 'tomme'"),
    ((dict,), {"share": 0.5}, "no method <class 'dict'>"),
    ((ToMeConfig(r=3),), {"share": 0.5}, r"share can be given with a method's name .* not with ToMeConfig\(r=3"),
    ((ToMeConfig(r=3),), {"images": PIXELS}, "images can be given with a method's name"),
    ((None,), {"image_processor": 3}, "image_processor can be given with a method's name"),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_is_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        reduce_tokens(twelve(), *given, **options)


@pytest.mark.parametrize("model", [nn.DataParallel(tiny_model()), "facebook/deit-tiny-patch16-224"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="reduce_tokens cannot reduce a"):
        reduce_tokens(model, "tome", share=0.5)


def test_a_filter_that_has_learned_takes_a_new_share():
    model = reduce_tokens(twelve(), "dlvit", share=0.5, trained=True)
    assert 0.4 < share_on(model, tiny_images(2)) <= 0.5


def test_a_method_without_a_share_says_so(monkeypatch):
    monkeypatch.setitem(METHODS, "bat", Method(BATConfig, "Without", "none", "Nothing."))
    for options in ({}, {"images": PIXELS}):
        with pytest.raises(ValueError, match="Without has no setting for a share"):
            reduce_tokens(twelve(), "bat", share=0.5, **options)


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [(ToMeConfig, "r", 8), (BATConfig, "keep_rate", 0.7), (DLViTConfig, "keep_rate", 0.5)],
)
def test_a_share_decides_a_setting_alone(config_class, name, value):
    with pytest.raises(ValueError, match=f"a share decides {name}, so leave {name} out"):
        config_class.for_budget(twelve().config, 0.65, **{name: value})


def test_shares_are_numbers_of_any_kind():
    assert reduce_tokens(twelve(), "tome", share=np.float64(0.7)).config.reduction.r
    assert reduce_tokens(twelve(), "tome", share=np.float32(0.7)).config.reduction.r
    with pytest.raises(ValueError, match="share must be the share of multiply-adds"):
        reduce_tokens(twelve(), "tome", share=True)
