"""Some encoders, such as DINOv2, are given images of another size than their configuration says."""

import itertools
import re

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from families import family_model
from helpers import tiny_model
from PIL import Image
from transformers import BitImageProcessor

from hf_tokenreduce import LTMPConfig, SiTConfig, calibrate, export, load_exported, reduce_tokens
from hf_tokenreduce.evaluation.compute import describe_model, measured_multiply_adds
from hf_tokenreduce.evaluation.paying import nearest_that_pays
from hf_tokenreduce.hub import model_card
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.methods.fitting import share_on
from hf_tokenreduce.modeling.methods import parse_reduction
from hf_tokenreduce.serve import SideBySide
from hf_tokenreduce.training import make_labels
from hf_tokenreduce.training.run import DataArguments, ModelArguments, reduce


SIZE = {"height": 32, "width": 32}  # 8 x 8 patches; the configuration says 24 x 24
PROCESSOR = BitImageProcessor(size=SIZE, crop_size=SIZE)
PICTURE = Image.effect_noise((40, 36), 80).convert("RGB")


@pytest.fixture
def model():
    return family_model("dinov2", image_size=96).eval()


def pixels(count=2):
    return PROCESSOR([PICTURE] * count, return_tensors="pt")["pixel_values"]


def test_training_keeps_the_share_of_what_it_trains_on(model):
    arguments = ModelArguments("dinov2", reduction="tome", share=0.65)
    reduced = reduce(model, arguments, None, PROCESSOR, DataArguments(), torch.device("cpu"))
    assert share_on(reduced, pixels()) == pytest.approx(0.65, abs=0.03)


def test_calibration_tells_of_another_size(model, caplog):
    """Thresholds that were fitted to images of fewer patches prune far too many at the model's own size. It warns only
    if that size is fixed."""
    vit = reduce_tokens(tiny_model(), LTMPConfig(target=0.7))
    calibrate(vit, torch.randn(3, 3, 32, 32), 0.7)
    calibrate(reduce_tokens(model, LTMPConfig(target=0.7)), pixels(3), 0.7)
    assert "patches" not in caplog.text
    calibrate(vit, torch.randn(3, 3, 24, 24), 0.7)
    assert "These images have 6 x 6 patches, and those of the model's own size have 8 x 8" in caplog.text


def test_the_page_keeps_the_share_of_its_image(model):
    page = SideBySide(model, PROCESSOR)
    reduced = reduce_tokens(model, page.setting(METHODS["tome"].title, 0.65, pixels(1)))
    assert share_on(reduced, pixels()) == pytest.approx(0.65, abs=0.03)


def test_a_model_is_described_at_that_size(model):
    reduced = reduce_tokens(model, "tome", share=0.65, image_processor=PROCESSOR)
    found = describe_model(reduced, "dinov2", PROCESSOR)
    assert found["image_size"] == [32, 32] and "65 tokens" in found["backbone"]
    assert found["share"] == pytest.approx(0.65, abs=0.03)
    assert found["multiply_adds"] == measured_multiply_adds(reduced, pixels(1)).item()
    assert found["dense_multiply_adds"] == measured_multiply_adds(model, pixels(1)).item()
    assert describe_model(reduced, "dinov2")["image_size"] == 96


def test_so_does_its_card(model, tmp_path):
    reduced = reduce_tokens(model, "tome", share=0.65, image_processor=PROCESSOR)
    reduced.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    card = model_card(tmp_path)
    share = float(re.search(r"multiply-adds of the encoder \| 1 \| (0\.\d+)", card)[1])
    assert share == pytest.approx(0.65, abs=0.03) and "layer  0      " in card and " 577 " not in card


def test_a_setting_that_pays_is_looked_for_at_that_size(model):
    reduced = reduce_tokens(model, "tome", share=0.9, image_processor=PROCESSOR)
    clock = itertools.cycle([2.0, 1.0])  # dense and candidate in turns, so the first one that is tried pays
    setting, _ = nearest_that_pays(reduced, model, [pixels()], 1, lambda call: call() and next(clock))
    assert 0.8 < share_on(reduce_tokens(model, parse_reduction(setting)), pixels()) < 0.95


def test_a_graph_takes_what_its_processor_makes(model, tmp_path):
    reduced = reduce_tokens(model, "tome", share=0.65, image_processor=PROCESSOR)
    found = export(reduced, tmp_path / "graph", image_processor=PROCESSOR, format="torch")
    assert found["shape"] == [3, 32, 32]
    logits = load_exported(tmp_path / "graph", trust_remote_code=True)(pixels())
    assert not logits.requires_grad
    torch.testing.assert_close(logits, reduced(pixels()).logits, rtol=1e-4, atol=1e-5)


def test_what_is_made_for_one_size_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"made for 24 x 24 patches, .* these images have 8 x 8"):
        calibrate(reduce_tokens(model, SiTConfig(layers=(1,))), pixels())
    rows = {"image": [PICTURE, PICTURE], "label": [0, 1]}
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    photos = Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": ClassLabel(names=names)}))
    with pytest.raises(ValueError, match="8 x 8 patches, but the configuration of the model says 24 x 24"):
        make_labels(model, photos, tmp_path / "labels", image_processor=PROCESSOR)
