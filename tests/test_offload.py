"""Models whose weights lie on the disk, by `device_map`, and models that are spread over devices."""

import pytest
import torch
from accelerate import cpu_offload
from families import family_model
from helpers import tiny_images, tiny_model
from transformers import ViTForImageClassification

from hf_tokenreduce import ATSConfig, DLViTConfig, DTEMConfig, LTMPConfig, SiTConfig, ToMeConfig, reduce_tokens


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


def saved_and_reduced(setting, folder):
    stock = tiny_model(num_hidden_layers=4)
    reduced = reduce_tokens(stock, setting)
    stock.save_pretrained(folder / "stock")
    reduced.save_pretrained(folder / "reduced")
    return type(stock), type(reduced)


@pytest.mark.parametrize(
    "setting",
    [LTMPConfig(), SiTConfig(layers=(1, 2)), DTEMConfig(r=3), DLViTConfig(keep_rate=0.6, trained=True)],
    ids=lambda one: one.method,
)
def test_learned_parts_may_not_lie_on_the_disk(setting, tmp_path):
    stock, reduced = saved_and_reduced(setting, tmp_path)
    options = {"device_map": device_map(*["disk"] * 4), "offload_folder": tmp_path / "weights"}
    with pytest.raises(ValueError, match="learned parts in the layers"):
        reduced.from_pretrained(tmp_path / "reduced", **options)
    with pytest.raises(ValueError, match="learned parts in the layers"):
        reduce_tokens(stock.from_pretrained(tmp_path / "stock", **options), setting)
    even = reduce_tokens(stock.from_pretrained(tmp_path / "stock", **options), ToMeConfig(r=3))
    with pytest.raises(ValueError, match="learned parts in the layers"):
        even.set_reduction(setting)
    assert even.config.reduction == ToMeConfig(r=3)
    loaded = reduced.from_pretrained(tmp_path / "reduced", device_map="cpu")
    with torch.no_grad():
        loaded.eval()(tiny_images())


def test_layers_with_weights_of_their_own_are_not_converted_from_the_disk():
    stock = cpu_offload(family_model("beit"), torch.device("cpu"))
    with pytest.raises(ValueError, match="lie on the CPU or the disk"):
        reduce_tokens(stock, ToMeConfig(r=3))
