"""Models whose weights lie on the disk, by `device_map`, and models that are spread over devices."""

import pytest
import torch
from helpers import tiny_images, tiny_model
from transformers import ViTForImageClassification

from hf_tokenreduce import ATSConfig, ToMeConfig, reduce_tokens


def device_map(*places):
    """Layer by layer; all else is on the CPU."""
    around = dict.fromkeys(("vit.embeddings", "vit.layernorm", "classifier"), "cpu")
    return around | {f"vit.layers.{layer}": place for layer, place in enumerate(places)}


@pytest.mark.parametrize("setting", [ToMeConfig(r=3), ATSConfig(layers=(1, 2))], ids=["even", "packed"])
def test_weights_may_lie_on_the_disk(setting, tmp_path):
    stock, images = tiny_model(num_hidden_layers=4), tiny_images()
    reduced = reduce_tokens(stock, setting).eval()
    with torch.no_grad():
        expected = reduced(images)
    for name, model in (("stock", stock), ("reduced", reduced)):
        model.save_pretrained(tmp_path / name)
    options = {"device_map": device_map("cpu", "disk", "cpu", "disk"), "offload_folder": tmp_path / "weights"}
    loaded = type(reduced).from_pretrained(tmp_path / "reduced", **options)
    dense = ViTForImageClassification.from_pretrained(tmp_path / "stock", **options)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    for model in (loaded, reduce_tokens(loaded, setting), reduce_tokens(dense, setting)):
        with torch.no_grad():
            output = model.eval()(images)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.token_counts, expected.token_counts)


def test_a_model_on_several_devices_is_refused():
    model = tiny_model(num_hidden_layers=4)
    model.hf_device_map = device_map(0, 0, 1, 1)
    with pytest.raises(ValueError, match="spread over 2 devices by device_map"):
        reduce_tokens(model, ToMeConfig(r=3))
    model.hf_device_map = device_map(0, 0, "cpu", "disk")
    reduce_tokens(model, ToMeConfig(r=3))
