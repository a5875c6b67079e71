"""Reduced models in 8 bits, by torchao and the `quantization_config` of transformers. One in 8 bits is not reduced."""

import pytest
import torch
from helpers import METHODS, tiny_model
from transformers import AutoModelForImageClassification, TorchAoConfig

from hf_tokenreduce import reduce_tokens


torchao = pytest.importorskip("torchao.quantization", reason="make test-torchao runs these tests")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("method", ["tome", "evit", "bat", "ltmp", "sit", "ats", "dlvit-share", "protected"])
def test_a_reduced_folder_loads_in_8_bits(tmp_path, method, kind):
    torch.manual_seed(0)
    setting = METHODS[method][0]
    model = reduce_tokens(tiny_model(), setting).eval()
    model.save_pretrained(tmp_path / "reduced")
    config = TorchAoConfig(getattr(torchao, kind)())
    small = AutoModelForImageClassification.from_pretrained(
        tmp_path / "reduced", quantization_config=config, dtype=torch.float32
    ).eval()
    assert small.config.reduction == setting
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, rounded = model(pixels), small(pixels)
    assert rounded.token_counts.shape == exact.token_counts.shape
    difference = (rounded.logits - exact.logits).abs()
    assert difference.max() > 0 and difference.mean() < 0.2 * exact.logits.std()  # some choices of tokens flip
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, rounded.logits, rtol=0, atol=0)


def test_a_model_in_8_bits_is_not_reduced(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    small = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    with pytest.raises(ValueError, match="quanti"):
        reduce_tokens(small, "tome", r=2)
