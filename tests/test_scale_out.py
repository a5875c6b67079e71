"""FSDP and DeepSpeed train as one process does, with the configuration files that docs/training.md shows."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import save_cat_and_dog
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_tokenreduce import DLViTConfig, reduce_tokens


HERE = Path(__file__).resolve().parents[1]
METHODS = {
    "tome": ["--logits_weight", 1],
    "sit": ["--reduction_args", '{"layers": [1, 2]}'],  # its recipe has a teacher of logits and tokens
    "ltmp": ["--share", 0.8],
    None: [],  # as the folder is
}
AS_ONE = ("tome", "sit", "ltmp")
CASES = [
    "ddp",
    "fsdp2",
    pytest.param("zero2", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is missing")),
]


@pytest.fixture
def start(tmp_path):
    """A model of two classes, and class folders with images."""
    save_cat_and_dog(tmp_path / "model")
    for split, count in (("train", 12), ("val", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def train(start, output, method, case=None, *more):
    # The images of an evaluation divide evenly, or Trainer's mean loss counts some of them twice.
    arguments = ["--model_name_or_path", start / "model", "--train_dir", start / "train", "--validation_dir"]
    arguments += [start / "val", "--output_dir", start / output, *METHODS[method]]
    arguments += [] if method is None else ["--reduction", method]
    arguments += ["--num_train_epochs", 2, "--augmentation", "none", "--lr_scheduler_type", "constant"]
    arguments += ["--logging_strategy", "steps", "--logging_steps", 1, "--disable_tqdm", "True"]
    arguments += ["--per_device_train_batch_size", 6 if case else 12, "--per_device_eval_batch_size", 3]
    arguments += ["--save_total_limit", 2, *more]
    if case is None:
        command = [sys.executable, HERE / "examples" / "run_image_classification.py", *arguments, "--use_cpu", "True"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [HERE / "examples" / "accelerate" / f"{case}.yaml", "--num_processes", 2]
        command += ["--main_process_port", port]
        if case == "ddp":
            command += [HERE / "examples" / "run_image_classification.py", "--use_cpu", "True"]
        else:
            command += [HERE / "tests" / "train_on_cpus.py"]
        command += ["--ddp_backend", "gloo", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((start / output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


def losses(log):
    return [value for entry in log for name, value in entry.items() if name.endswith("loss")]


@pytest.mark.slow
@pytest.mark.parametrize("method", AS_ONE)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(start, case, method):
    one, two = (losses(train(start, *run)) for run in (("one", method), ("two", method, case)))
    assert len(one) >= 2 * 4 + 2 and two == pytest.approx(one, abs=1e-4)
    weights = load_file(start / "one" / "model.safetensors")
    for place in ("two", "two/checkpoint-4"):
        model, info = AutoModelForImageClassification.from_pretrained(start / place, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4)
    record = json.loads((start / "two" / "record.json").read_text())
    assert record["method"] == method and record["mult_adds_ratio"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_resume(start, case):
    whole = train(start, "whole", "sit", case)
    resumed = train(start, "resumed", "sit", case, "--resume_from_checkpoint", start / "whole" / "checkpoint-2")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    one, other = (load_file(start / name / "model.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_two_processes_train_and_evaluate_on_a_stream_as_one(start, case):
    # The last batch of the evaluation is not full, and its images do not divide by two.
    settings = [
        "--streaming",
        "True",
        "--max_steps",
        4,
        "--save_steps",
        4,
        "--eval_steps",
        2,
        "--max_eval_samples",
        11,
    ]
    logs = [train(start, *run, *settings) for run in (("one", "tome", None), ("two", "tome", case))]
    one, two = (losses([entry for entry in log if "eval_loss" not in entry]) for log in logs)
    assert len(one) == 3 * 4 and two == pytest.approx(one, abs=1e-4)
    one, two = (json.loads((start / name / "record.json").read_text()) for name in ("one", "two"))
    assert one["eval_images"] == two["eval_images"] == 11
    assert (one["top1"], one["baseline_top1"]) == (two["top1"], two["baseline_top1"])
    half = ["--resume_from_checkpoint", start / "half" / "checkpoint-2"]
    train(start, "half", "tome", case, *settings, "--save_steps", 2)
    train(start, "resumed", "tome", case, *settings, *half)
    whole, resumed = (load_file(start / name / "model.safetensors") for name in ("two", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_two_processes_train_behind_a_filter(start, case):
    """DL-ViT's filter, which was fitted before, has no gradient: DDP must be told. It acts before the first layer,
    where FSDP has not gathered its weights."""
    stock = AutoModelForImageClassification.from_pretrained(start / "model")
    reduce_tokens(stock, DLViTConfig(keep_rate=0.7, trained=True)).save_pretrained(start / "model")
    more = ["--gradient_checkpointing", "True"] if case == "ddp" else []
    one, two = (losses(train(start, *run)) for run in (("one", None), ("two", None, case, *more)))
    assert len(one) >= 4 and two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp", CASES[-1]])
def test_two_processes_train_adapters_that_are_merged(start, case):
    train(start, "out", "sit", case, "--lora", "True", "--token_weight", 0)
    model, info = AutoModelForImageClassification.from_pretrained(start / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForImageClassification.from_pretrained(start / "model").state_dict()
    changed = {name for name, value in model.state_dict().items() if name in before and (value != before[name]).any()}
    assert any("q_proj" in name for name in changed)
