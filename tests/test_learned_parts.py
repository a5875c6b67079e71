"""What a model has learned stays where it is of use, and settings say what was learned for."""

import pytest
import torch
from datasets import Dataset
from families import family_inputs, family_model
from helpers import tiny_images, tiny_model
from PIL import Image
from transformers import ViTImageProcessor

import hf_tokenreduce.modeling.modeling_tokenreduce as modeling
from hf_tokenreduce import (
    DLViTConfig,
    DTEMConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    calibrate,
    reduce_tokens,
)
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.training.filter import fit_filter
from hf_tokenreduce.training.labels import make_labels
from hf_tokenreduce.training.run import method_in, parse
from hf_tokenreduce.tuning.search import Target
from hf_tokenreduce.tuning.trials import Quality
from hf_tokenreduce.tuning.tuner import _decided


def own_parameters(model):
    return [parameter for reducer in encoder_of(model).reducers for parameter in reducer.parameters()]


def test_a_method_by_its_name_keeps_what_the_model_has_learned():
    dtem = reduce_tokens(tiny_model(), DTEMConfig(r=4))
    again = reduce_tokens(dtem, "dtem", r=2)
    assert [id(one) for one in own_parameters(again)] == [id(one) for one in own_parameters(dtem)]

    thresholds = reduce_tokens(tiny_model(), LTMPConfig(target=0.7))
    calibrate(thresholds, tiny_images(8), 0.7)
    again = reduce_tokens(thresholds, "ltmp", share=0.8, images=tiny_images(8))  # fitted anew, and not in place
    found = [one.item() for one in own_parameters(thresholds)]
    assert found != [one.item() for one in own_parameters(again)]
    again = reduce_tokens(thresholds, "ltmp", target=0.7)
    assert [id(one) for one in own_parameters(again)] == [id(one) for one in own_parameters(thresholds)]
    assert again.config.calibrated_share == thresholds.config.calibrated_share

    filtered = reduce_tokens(tiny_model(), DLViTConfig(trained=True))
    for options in ({"keep_rate": 0.4}, {"share": 0.5}):
        again = reduce_tokens(filtered, "dlvit", **options)
        assert again.config.reduction.trained and again(tiny_images()).token_counts.max() < 65
        assert [id(one) for one in own_parameters(again)] == [id(one) for one in own_parameters(filtered)]
    assert not reduce_tokens(filtered, "dlvit", keep_rate=0.4, trained=False).config.reduction.trained


def test_every_untrained_model_is_told_of(caplog):
    for _ in range(2):
        caplog.clear()
        model = reduce_tokens(tiny_model(), LTMPConfig())
        assert "does not keep `target`" in caplog.text
    caplog.clear()
    model.set_reduction(SiTConfig(layers=(1,)))
    model.set_reduction(LTMPConfig())
    assert "random" in caplog.text and "does not keep `target`" in caplog.text


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("clip", "CLIPVisionModel"),
        ("clip", "CLIPVisionModelWithProjection"),
        ("siglip", "SiglipVisionModel"),
    ],
)
def test_a_part_of_a_folder_keeps_the_reduction(family, name, tmp_path):
    whole = reduce_tokens(family_model(family), ToMeConfig(r=7))
    whole.save_pretrained(tmp_path)
    part = getattr(modeling, f"TokenReduce{name}").from_pretrained(tmp_path).eval()
    inputs = family_inputs(family)
    seen = part(pixel_values=inputs["pixel_values"])
    assert part.config.reduction == ToMeConfig(r=7)
    with torch.no_grad():
        assert torch.equal(seen.token_counts, whole(**inputs).token_counts)
    assert seen.token_counts[0, -1] < seen.token_counts[0, 0]


def test_a_calibration_sets_the_target_of_later_training(tmp_path):
    model = reduce_tokens(tiny_model(), LTMPConfig(temperature=0.2))
    calibrate(model, tiny_images(8), 0.6)
    assert model.config.reduction == LTMPConfig(target=0.6, temperature=0.2)
    output = model.train()(tiny_images(8))
    assert output.auxiliary_loss < 10 * (0.75 - 0.6) ** 2 / 2  # it is near its own target
    model.save_pretrained(tmp_path)  # which refuses a setting that does not run
    assert type(model).from_pretrained(tmp_path).config.reduction.target == 0.6


@pytest.mark.parametrize("family", ["clip-classifier", "siglip-classifier", "dinov2"])
def test_the_filter_is_fitted_in_every_family_of_classifiers(family, tmp_path):
    stock = family_model(family)
    draw = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=draw).numpy() for _ in range(6)]
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [0, 1] * 3}
    dataset, options = (
        Dataset.from_dict(rows),
        {"image_processor": ViTImageProcessor(size={"height": 32, "width": 32})},
    )
    make_labels(stock, dataset, tmp_path, keep_share=0.5, **options)
    model = reduce_tokens(stock, DLViTConfig(keep_rate=0.5))
    assert fit_filter(model, tmp_path, dataset, epochs=1, **options).share_kept == 0.5
    assert model.config.reduction.trained


def test_the_recipe_is_that_of_the_folder(tmp_path):
    reduce_tokens(tiny_model(), LTMPConfig()).save_pretrained(tmp_path / "ltmp")
    tiny_model().save_pretrained(tmp_path / "dense")
    assert [method_in(str(tmp_path / name), "main") for name in ("ltmp", "dense", "none")] == ["ltmp", None, None]

    def recipe_of(name, *more):
        words = ["--model_name_or_path", tmp_path / name, "--output_dir", tmp_path / "out", "--train_dir", "x", *more]
        arguments = parse([str(word) for word in words])[2]
        return arguments.optim, arguments.freeze_backbone, arguments.prune_learning_rate

    by_name = recipe_of("dense", "--reduction", "ltmp")
    assert recipe_of("ltmp") == by_name and by_name[1] and "sgd" in by_name[0]
    assert recipe_of("dense") == recipe_of("dense", "--reduction", "tome") != by_name


def test_the_next_setting_that_pays_is_the_best_of_the_search():
    """Not the default, which stands first among the others."""

    def row(name, distance, low, *roles):
        quality = {"images": 9, "distance": distance, "agreement": None, "drop": None, "share": 0.5}
        times = {"speedup": low + 0.1, "speedup_interval": [low, low + 0.2], "speed_batch_size": 8}
        return {"name": name, "roles": list(roles), "search": quality, **times}

    rows = [row("dense", 0.0, 1.0), row("wanted", 0.1, 0.9, "chosen"), row("default", 0.3, 1.2, "default")]
    rows += [row("worse", 0.4, 1.4, "runner-up"), row("better", 0.2, 1.2, "runner-up"), row("slow", 0.1, 0.8, "front")]
    rows[0]["search"] = None
    chosen, why = _decided(rows, Target("share", 0.5), True, "", lambda quality: quality.distance)
    assert chosen["name"] == "better" and chosen["roles"][0] == "chosen" and "does not pay" in why
    assert Quality(**rows[1]["search"]).distance == 0.1


def test_the_budget_of_a_model_of_texts_is_shared_by_its_words():
    """Trainer tells a model how many words all batches of a step have. The parts add up to one mean."""
    model = reduce_tokens(family_model("llava"), LTMPConfig(merge_threshold=0.5)).train()
    inputs = family_inputs("llava")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    own = (labels[:, 1:] != -100).sum()
    alone = model(**inputs, labels=labels)
    half = model(**inputs, labels=labels, num_items_in_batch=2 * own)
    torch.testing.assert_close(half.auxiliary_loss, alone.auxiliary_loss / 2)
    torch.testing.assert_close(half.loss, alone.loss / 2)


def test_the_budget_of_several_labels_per_image_is_whole():
    """Trainer counts the labels of all classes, and the loss of the classes is not divided."""
    model = reduce_tokens(tiny_model(), LTMPConfig(merge_threshold=0.5)).train()
    model.config.problem_type = "multi_label_classification"
    labels = (torch.rand(3, 5) > 0.5).float()
    alone = model(tiny_images(), labels=labels)
    told = model(tiny_images(), labels=labels, num_items_in_batch=labels.numel())
    torch.testing.assert_close(told.auxiliary_loss, alone.auxiliary_loss)
    torch.testing.assert_close(told.loss, alone.loss)
