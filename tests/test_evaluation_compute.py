"""Multiply-adds of whole models: arithmetic, torch's counter and fvcore's agree, and are the papers' figures."""

import pytest
import torch
from helpers import ADAPTIVE, EVERY_CASE, METHODS, reduce_tiny, tiny_images, tiny_model
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from hf_tokenreduce import EViTConfig, LTMPConfig, SiTConfig, ToMeConfig, TopKConfig, reduce_tokens
from hf_tokenreduce.evaluation.compute import (
    dense_multiply_adds,
    describe_compute,
    describe_model,
    measured_multiply_adds,
    total_multiply_adds,
)


@pytest.mark.parametrize(("backbone", "method"), EVERY_CASE)
def test_arithmetic_is_what_is_counted(backbone, method):
    stock = tiny_model(backbone)
    assert stock.config._attn_implementation == "sdpa"
    images = tiny_images(3)
    model = reduce_tiny(stock, METHODS[method][0])
    with torch.no_grad():
        counts = model(images).token_counts
    measured = measured_multiply_adds(model, images)
    assert measured.tolist() == total_multiply_adds(model, counts).tolist()
    assert model.config._attn_implementation == "sdpa"
    assert measured_multiply_adds(stock, images[:1]).item() == dense_multiply_adds(model) == dense_multiply_adds(stock)
    if method in ADAPTIVE:
        with pytest.raises(ValueError, match="depends on the image"):
            total_multiply_adds(model)
    else:
        assert total_multiply_adds(model).item() == measured[0] == measured[2]
        assert total_multiply_adds(stock, reduction=METHODS[method][0].to_dict()).item() == measured[0]


def test_images_of_another_size_enter_the_first_layer_and_all_others():
    """DINOv2's configuration names 37 x 37 patches, and its processor makes 16 x 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4, "mlp_ratio": 2, "patch_size": 8}
    stock = Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=128, num_labels=3)).eval()
    model = reduce_tokens(stock, TopKConfig(keep_rate=0.5, layers=(0, 2)))
    with torch.no_grad():
        counts = model(tiny_images(1)).token_counts
    assert total_multiply_adds(model, num_tokens=17) == total_multiply_adds(model, counts, num_tokens=17)
    slimmed = reduce_tokens(stock, SiTConfig(layers=(0, 2)))
    with pytest.raises(ValueError, match="takes images of one size, so leave num_tokens out"):
        total_multiply_adds(slimmed, num_tokens=17)


@pytest.mark.parametrize(("backbone", "classes"), [("vit", 5), ("deit-teacher", 5), ("vit-base", None)])
def test_a_description_has_the_number_of_labels(backbone, classes):
    model = tiny_model("vit", {"vit": (ViTModel, ViTConfig)}) if backbone == "vit-base" else tiny_model(backbone)
    assert describe_model(model, "a model")["labels"] == classes


def test_a_base_model_with_its_pooler_and_images_of_another_size():
    model = tiny_model("vit", {"vit": (ViTModel, ViTConfig)})
    assert measured_multiply_adds(model, tiny_images(1)).item() == dense_multiply_adds(model)
    bare = dense_multiply_adds(ViTModel(model.config, add_pooling_layer=False))
    assert dense_multiply_adds(model) - bare == 48 * 48
    wide = ViTForImageClassification(ViTConfig(**{**model.config.to_dict(), "image_size": [24, 48]}))
    assert measured_multiply_adds(wide, torch.randn(1, 3, 24, 48)).item() == dense_multiply_adds(wide)


def test_training_mode_comes_back_and_nothing_is_masked():
    model = reduce_tiny(tiny_model(), METHODS["ltmp"][0]).train()
    model.base_model.layers[1].eval()
    counts = measured_multiply_adds(model, tiny_images(2))
    assert counts.max() < dense_multiply_adds(model)
    assert model.training and not model.base_model.layers[1].training


def test_a_description():
    stock = tiny_model()
    model = reduce_tokens(stock, ToMeConfig(r=7))
    found = describe_compute(model)
    assert found == describe_compute(model, tiny_images(2))
    assert found["parameters"] == sum(p.numel() for p in stock.parameters())
    assert found["share"] == found["multiply_adds"]["mean"] / found["dense_multiply_adds"]
    adaptive = describe_compute(reduce_tiny(stock, METHODS["ltmp"][0]), tiny_images(20))["multiply_adds"]
    assert adaptive["min"] < adaptive["p50"] < adaptive["p95"] <= adaptive["max"]
    with pytest.raises(ValueError, match="depends on the image"):
        describe_compute(reduce_tokens(stock, LTMPConfig()))
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, C, H, W\)"):
        measured_multiply_adds(stock, tiny_images(1)[0])


def small(**changes):
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
    return ViTForImageClassification(ViTConfig(**shape, **changes))


def test_papers_figures_of_deit_small():
    model = small()
    assert dense_multiply_adds(model) / 1e9 == pytest.approx(4.6, abs=0.05)
    saved = 1 - total_multiply_adds(reduce_tokens(model, None)).item() / dense_multiply_adds(model)
    assert saved == pytest.approx(0.07, abs=0.002)  # by the last layer of the class token alone, as the pages say
    found = total_multiply_adds(model, reduction=ToMeConfig(r=13), as_in_papers=True)
    assert found.item() / 1e9 == pytest.approx(2.7, abs=0.05)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def scatter_one_value(tensor, dim, index, value, scatter=torch.Tensor.scatter):
    """`Tensor.scatter`, which torch's tracer has no word for where the value is a bool."""
    filled = torch.full_like(index, int(value), dtype=tensor.dtype) if isinstance(value, bool) else value
    return scatter(tensor, dim, index, filled)


@pytest.mark.parametrize("reduction", [None, ToMeConfig(r=13), EViTConfig(), TopKConfig(keep_rate=0.5), SiTConfig()])
def test_fvcore_counts_the_same_on_deit_small(monkeypatch, reduction):
    monkeypatch.setattr(torch.Tensor, "scatter", scatter_one_value)
    fvcore = pytest.importorskip("fvcore.nn")
    model = reduce_tokens(small(attn_implementation="eager").eval(), reduction)
    # Traced by fvcore; norms, which it counts and papers do not, left out.
    analysis = fvcore.FlopCountAnalysis(Logits(model), torch.randn(1, 3, 224, 224))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    products = {name: count for name, count in analysis.by_operator().items() if name != "layer_norm"}
    assert set(products) <= {"conv", "linear", "matmul", "addmm", "bmm"}, products
    # It looks by hooks, so the last layer is computed as a whole.
    assert sum(products.values()) == total_multiply_adds(model, as_in_papers=True).item()
