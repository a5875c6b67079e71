"""The arithmetic of multiply-adds against torch's counter on the real forward, and settings for a budget."""

import pytest
import torch
from helpers import EVEN, EVERY_CASE, METHODS, NUM_PATCHES, reduce_tiny, tiny_images, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
)
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.modeling.multiply_adds import even_counts, even_share, multiply_adds


def counted(model, images, whole=True):
    """Count the encoder's multiply-adds with torch's counter. By default the last layer is whole, as papers count.

    Returns their mean over the images, and the output.
    """
    if whole:  # who looks at a layer sees all of it
        encoder_of(model).layers[-1].register_forward_hook(lambda *seen: None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(images)
    heads = 2 if hasattr(model, "cls_classifier") else 1
    outside = NUM_PATCHES * 3 * 4 * 4 * 48 + heads * 48 * 5  # patch embedding and head
    return counter.get_total_flops() / 2 / len(images) - outside, output


@pytest.mark.parametrize(("backbone", "method"), EVERY_CASE)
def test_they_are_those_counted(backbone, method):
    model = reduce_tiny(tiny_model(backbone, attn_implementation="eager"), METHODS[method][0])
    num_tokens = model.config.num_prefix_tokens + NUM_PATCHES
    for image in tiny_images(2).split(1):
        alone, output = counted(model, image, whole=False)
        ours = multiply_adds(model.config, output.token_counts, num_tokens, model.config.reduction, for_prefix=True)
        assert ours.item() == alone
    for image in tiny_images(2).split(1):
        theirs, output = counted(model, image)
        ours = multiply_adds(model.config, output.token_counts, num_tokens, model.config.reduction)
        assert ours.item() == theirs
        if method in EVEN:
            assert even_counts(model.config.reduction, model.config) == output.token_counts[0].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_model(method):
    model = reduce_tiny(tiny_model(attn_implementation="eager"), METHODS[method][1])
    theirs, output = counted(model, tiny_images(1))
    dense = multiply_adds(model.config, output.token_counts, 65)
    assert dense.item() == 4 * (65 * (4 * 48 * 48 + 2 * 48 * 96) + 2 * 65 * 65 * 48)
    if not method.startswith(("ltmp", "dlvit")):  # these look even where nothing comes of it
        assert theirs == dense.item()
        if method in EVEN:
            assert even_share(METHODS[method][1], model.config) == 1.0


BUDGETS = {
    ToMeConfig: {},
    TopKConfig: {"layers": (0, 2)},
    EViTConfig: {"layers": (1, 2), "fuse": False},
    BATConfig: {"layers": (0, 1, 2), "cluster_share": 0.3},
    SiTConfig: {"layers": (0, 1)},
    DLViTConfig: {},
}


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8, 0.93])
@pytest.mark.parametrize("backbone", ["vit", "deit"])
@pytest.mark.parametrize("config_class", BUDGETS)
def test_a_setting_for_a_budget(config_class, backbone, share):
    stock = tiny_model(backbone, attn_implementation="eager")
    setting = config_class.for_budget(stock.config, share, **BUDGETS[config_class])
    if config_class is DLViTConfig:
        assert not setting.trained
        setting = DLViTConfig(keep_rate=setting.keep_rate, trained=True)
    assert isinstance(setting, config_class)
    reached = counted(reduce_tiny(stock, setting), tiny_images(1))[0] / counted(stock, tiny_images(1))[0]
    assert reached == pytest.approx(even_share(setting, stock.config), abs=1e-12)
    assert share - 0.04 < reached <= share


def test_budgets_of_real_sizes():
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    for config_class in BUDGETS:
        setting = config_class.for_budget(config, 0.65)
        if config_class is DLViTConfig:
            setting = DLViTConfig(keep_rate=setting.keep_rate, trained=True)
        assert 0.64 < even_share(setting, config) <= 0.65, setting
    # The papers' figures for DeiT-S: 4.6 G dense; ToMe r=13 2.7 G; BAT 0.7, 0.5, 0.3: 3.0, 2.3, 1.8 G.
    outside = 196 * 16 * 16 * 3 * 384 + 384 * 1000
    dense = multiply_adds(config, torch.full((1, 12), 197), 197).item()
    assert (dense + outside) / 1e9 == pytest.approx(4.6, abs=0.05)
    for setting, giga in (
        (ToMeConfig(r=13), 2.7),
        (BATConfig(keep_rate=0.7), 3.0),
        (BATConfig(keep_rate=0.5), 2.3),
        (BATConfig(keep_rate=0.3), 1.8),
    ):
        assert (dense * even_share(setting, config) + outside) / 1e9 == pytest.approx(giga, rel=0.05)


def test_budgets_that_cannot_be():
    config = tiny_model().config
    for config_class in BUDGETS:
        settings = {"layers": (2, 3)} if "layers" in BUDGETS[config_class] else {}
        with pytest.raises(ValueError, match=r"0\.001 cannot be reached.*keeps 0\."):
            config_class.for_budget(config, 0.001, **settings)
        for share in (0, 1.1, -0.5):
            with pytest.raises(ValueError, match="share must be the share of multiply-adds"):
                config_class.for_budget(config, share, **settings)
        assert even_share(config_class.for_budget(config, 1.0, **settings), config) == 1.0
    with pytest.raises(ValueError, match="no layer 6 in a model of 4 layers"):
        TopKConfig.for_budget(config, 0.7)
    for config_class in (ATSConfig, LTMPConfig):
        with pytest.raises(ValueError, match=r"depends on the images.*calibrate"):
            config_class.for_budget(config, 0.65)
        with pytest.raises(ValueError, match=r"depends on the image.*token_counts"):
            even_counts(config_class(), config)
