"""What the record of a training says, and what its options mean, in trainings of a few steps."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from families import family_inputs, family_model
from helpers import tiny_images, tiny_model
from PIL import Image
from torch.nn import functional as F
from transformers import ViTImageProcessor
from transformers.utils import cached_file

from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.hub.card import _limits
from hf_tokenreduce.hub.records import trained_how
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.modeling.multiply_adds import even_counts, even_share
from hf_tokenreduce.training import TokenReduceTrainer, TokenReduceTrainingArguments, measuring
from hf_tokenreduce.training import trainer as trainer_module
from hf_tokenreduce.training.data import load_data
from hf_tokenreduce.training.origin import fitted_on, was_trained
from hf_tokenreduce.training.run import DataArguments, main, name_of_validation, parse


@pytest.fixture
def start(tmp_path):
    """A model of two classes, and class folders."""
    model = tiny_model(num_labels=2)
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 10)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def command(start, *more):
    words = ["--model_name_or_path", start / "model", "--train_dir", start / "train", "--output_dir", start / "out"]
    words += ["--use_cpu", "True", "--disable_tqdm", "True", "--per_device_train_batch_size", 6, *more]
    return [str(word) for word in words]


def record_of(start, *more):
    main(command(start, "--validation_dir", start / "val", *more))
    return json.loads((start / "out" / "record.json").read_text())


@pytest.mark.parametrize("half", ["False", "True"])
def test_both_models_are_compared_in_one_type(start, monkeypatch, half):
    """After training in bf16 too: autocast stays around the trained model, and the dense one has none."""
    types, linear, in_turns = [], F.linear, measuring.in_turns

    def typed(*given):
        made = linear(*given)
        types[-1].add(made.dtype)
        return made

    def watched(calls, *others):
        for call in calls:
            types.append(set())
            with monkeypatch.context() as patch:
                patch.setattr(F, "linear", typed)
                call()
        in_turns(calls, *others)
        return [[1.0], [2.0]]  # the reduced model's time, and the dense one's

    monkeypatch.setattr(measuring, "in_turns", watched)
    record = record_of(start, "--bf16", half, "--num_train_epochs", 1, "--learning_rate", 0)
    assert types == [{torch.float32}, {torch.float32}] and record["speedup"] == 2.0
    assert record["top1"] == record["baseline_top1"]  # nothing was learned, so rounding would make the difference


def test_the_best_of_several_epochs_is_called_a_choice(start):
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_accuracy", "--learning_rate", 1e-3]
    record = record_of(start, "--num_train_epochs", 3, *best)
    states = [json.loads(file.read_text()) for file in (start / "out").glob("*/trainer_state.json")]
    (kept,) = {state["best_global_step"] for state in states}
    assert record["chosen_by_evaluation"] and record["epochs"] == kept / 4  # of 4 steps
    limits = _limits(None, record, None, False, None, "image")
    assert any("the best on these images was kept" in limit for limit in limits)
    assert "chosen_by_evaluation" not in record_of(start, "--num_train_epochs", 0, "--overwrite")


def test_a_card_counts_the_images_of_a_stream():
    assert trained_how({"epochs": 1.0, "streamed_images": 12_800, "dataset": "shards"}).startswith(
        "12,800 images of a stream on shards"
    )


@pytest.mark.parametrize("what", ["save", "eval", "logging"])
def test_a_number_of_steps_is_obeyed(start, what):
    chosen = {name: getattr(parse(command(start))[2], f"{name}_strategy") for name in ("save", "eval", "logging")}
    assert set(chosen.values()) == {"epoch"}
    for spelling in ([f"--{what}_steps", "2"], [f"--{what}-steps=2"]):
        args = parse([*command(start), *spelling])[2]
        found = {name: getattr(args, f"{name}_strategy") for name in chosen}
        assert found == {**chosen, what: "steps"} and getattr(args, f"{what}_steps") == 2
    args = parse([*command(start), f"--{what}_steps", "2", f"--{what}_strategy", "epoch"])[2]
    assert getattr(args, f"{what}_strategy") == "epoch"


def test_images_that_a_filter_has_labels_of_are_not_new(start, caplog):
    (start / "model" / "record.json").write_text(json.dumps({"method": "dlvit", "fitted_on": f"{start.name}/train"}))
    names = DataArguments(train_dir=str(start / "train"))
    assert "not of the labels of the filter" in name_of_validation(names, model=str(start / "model"))
    assert name_of_validation(names) == f"{start.name}/train (a part held out)"
    names.validation_dir = str(start / "val")
    assert name_of_validation(names, model=str(start / "model")) == f"{start.name}/val"


def test_models_of_sounds_train_too(tmp_path):
    sounds = family_inputs("ast", 8)["input_values"]
    rows = [{"input_values": sound, "labels": number % 2} for number, sound in enumerate(sounds)]
    options = {"use_cpu": True, "max_steps": 2, "remove_unused_columns": False, "report_to": "none"}
    arguments = TokenReduceTrainingArguments(tmp_path, logits_weight=1.0, logging_steps=1, **options)
    model = reduce_tokens(family_model("ast"), ToMeConfig(r=3))
    trainer = TokenReduceTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "distillation_loss" in entry]
    patches, prefix = encoder_of(model).facts.num_patches, encoder_of(model).facts.num_prefix_tokens
    assert [entry["tokens/layer_1"] for entry in logs] == [patches + prefix - 6] * 2
    assert all(0.5 < entry["multiply_adds_share"] < 1 for entry in logs)


@pytest.mark.parametrize("most", [1, 2, 64])
def test_token_counts_are_read_for_many_batches_at_once(tmp_path, monkeypatch, most):
    """Reading them waits for a GPU. The keep rate of the warm-up changes between the batches."""
    monkeypatch.setattr(trainer_module, "MOST_UNREAD", most)
    unread, model = [], reduce_tokens(tiny_model(), EViTConfig(keep_rate=0.5, layers=(1,)))

    class Watched(TokenReduceTrainer):
        def _record(self, *args):
            super()._record(*args)
            unread.append(len(self._unread))

    rows = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(tiny_images(12))]
    options = {"use_cpu": True, "max_steps": 3, "logging_steps": 3, "report_to": "none", "keep_rate_warmup": 1.0}
    arguments = TokenReduceTrainingArguments(
        tmp_path, per_device_train_batch_size=4, learning_rate=0.0, remove_unused_columns=False, **options
    )
    trainer = Watched(model, arguments, train_dataset=rows)
    trainer.train()
    assert unread == {1: [0, 0, 0], 2: [1, 0, 1], 64: [1, 2, 3]}[most] and not trainer._unread
    rates = [1.0, 0.83, 0.67]
    facts = encoder_of(model).facts
    counts = [even_counts(EViTConfig(keep_rate=rate, layers=(1,)), facts) for rate in rates]
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["tokens/layer_2"] == pytest.approx(sum(count[2] for count in counts) / 3, abs=1e-4)
    shares = [even_share(EViTConfig(keep_rate=rate, layers=(1,)), facts) for rate in rates]
    assert logged["multiply_adds_share"] == pytest.approx(sum(shares) / 3, abs=1e-5)


def test_the_record_of_a_model_on_the_hub_is_read(tmp_path, monkeypatch):
    """The record lies in the cache, as it does after a download."""
    cache = tmp_path / "models--someone--vit-bat"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    record = {"method": "bat", "epochs": 3, "fitted_on": "photos"}
    (cache / "snapshots" / "0123" / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr("hf_tokenreduce.training.origin.cached_file", partial(cached_file, cache_dir=tmp_path))
    assert was_trained("someone/vit-bat") and was_trained("someone/vit-bat", "main")
    assert fitted_on("someone/vit-bat") == "photos"
    assert not was_trained("someone/vit-tome") and fitted_on(str(tmp_path / "none")) is None


def test_what_was_written_about_an_older_model_goes(start):
    """But only with that model: another README.md may be of the user."""
    out = start / "out"
    out.mkdir()
    (out / "README.md").write_text("of the user")
    record_of(start, "--num_train_epochs", 0)
    assert (out / "README.md").read_text() == "of the user"
    (out / "token_map.png").touch()
    record_of(start, "--num_train_epochs", 0, "--overwrite", "True")
    assert not (out / "README.md").is_file() and not (out / "token_map.png").is_file()
    assert (out / "record.json").is_file()


def test_a_reduced_folder_is_trained_further_with_lora(start):
    """The model before the training has its adapters already when it is evaluated."""
    record = record_of(start, "--num_train_epochs", 0, "--reduction", "tome", "--share", 0.8)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(start / "out" / name, start / "model" / name)
    words = ["--lora", "True", "--overwrite", "True", "--num_train_epochs", 1, "--learning_rate", 0]
    again = record_of(start, *words)
    assert again["method"] == "tome" and again["baseline_top1"] == record["baseline_top1"]


def test_every_seed_is_evaluated_on_the_same_images(start):
    data = DataArguments(
        train_dir=str(start / "train"), validation_dir=str(start / "val"), max_train_samples=9, max_eval_samples=7
    )
    first, second = (load_data(data, seed) for seed in (0, 1))
    assert first[1]["image"] == second[1]["image"] and len(first[1]) == 7
    assert first[0]["image"] != second[0]["image"]


def test_images_are_mixed_also_where_two_classes_have_one_name(start):
    """As in ImageNet: the data have fewer classes than the head has outputs."""
    config = json.loads((start / "model" / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "cat", "2": "dog"}, "label2id": {"cat": 0, "dog": 2}}
    model = tiny_model(num_labels=3)
    model.save_pretrained(start / "model")
    (start / "model" / "config.json").write_text(json.dumps(config))
    record = record_of(start, "--num_train_epochs", 1, "--augmentation", "strong")
    assert record["epochs"] == 1


def test_a_folder_that_may_not_be_written_into_is_refused_before_the_training(start, monkeypatch):
    (start / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != start / "out")
    with pytest.raises(ValueError, match="may not be written into"):
        parse(command(start))
