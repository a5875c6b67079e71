"""What people give to commands by mistake: one line that names it and says what to do, and nothing written."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from families import family_model
from helpers import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ASTFeatureExtractor, ViTImageProcessor

from hf_tokenreduce import LTMPConfig, ToMeConfig, reduce_tokens, restore
from hf_tokenreduce.evaluation.compute import describe_model
from hf_tokenreduce.files import known_settings
from hf_tokenreduce.loading import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    model = tiny_model(num_hidden_layers=12)
    model.config.id2label = {index: f"c{index}" for index in range(5)}
    model.config.label2id = {f"c{index}": index for index in range(5)}
    model.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for name in ("c0", "c1"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    return folder


def huge_png(file):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


def tar(folder):
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "c0" / "0.png", "0.png")
    for name in ("c0", "c1"):
        shutil.rmtree(folder / name)


def only(file, text):
    def change(folder):
        for name in ("c0", "c1"):
            shutil.rmtree(folder / name)
        (folder / file).write_text(text)

    return change


def renamed(folder):
    os.rename(folder / "c0" / "0.png", os.fsencode(folder / "c0") + b"/\xff\xfe.png")


def metadata(folder):
    (folder / "c0" / "metadata.csv").write_text("file_name,text\n0.png,a\n")


DATA = {
    "not-utf8": (renamed, "not UTF-8"),
    "csv": (only("a.csv", "x,y\n1,2\n"), "holds no images"),
    "text": (only("a.txt", "hello"), "holds no images"),
    "webdataset": (tar, "holds no images.*unpack archives"),
    "metadata": (metadata, "metadata file"),
    "one class": (lambda folder: shutil.rmtree(folder / "c1"), "no classes. Make one folder per class, at least two"),
    "broken": (lambda folder: (folder / "c0" / "1.png").write_bytes(b"\x89PNG junk"), "1.png"),
    "bomb": (lambda folder: huge_png(folder / "c0" / "1.png"), "1.png|exceeds limit"),
}


@pytest.mark.parametrize("command", ["evaluate", "train"])
@pytest.mark.parametrize("kind", DATA)
def test_data_that_is_none(call, place, tmp_path, command, kind):
    change, message = DATA[kind]
    data = shutil.copytree(place / "photos", tmp_path / "data")
    change(data)
    arguments = [command, place / "model", data]
    if command == "train":
        arguments = [
            "train",
            place / "model",
            "--train-dir",
            data,
            "-o",
            tmp_path / "out",
            "--epochs",
            1,
            "--batch-size",
            4,
        ]
        arguments += ["--ignore_mismatched_sizes", "--use_cpu", "True", "--disable_tqdm", "True"]
    code, _, errors = call(*arguments)
    last = errors.strip().splitlines()[-1]
    assert code == 2 and last.startswith("tokenreduce: "), errors
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_macos_leaves_is_no_image(call, place, tmp_path):
    data = shutil.copytree(place / "photos", tmp_path / "data")
    (data / "c0" / "._0.png").write_bytes(b"\0\5\x16\7junk")
    code, _, errors = call(
        "reduce", place / "model", "-r", "ltmp", "--share", 0.7, "--images", data, "-o", tmp_path / "ltmp"
    )
    assert code == 0, errors
    code, _, errors = call("show", tmp_path / "ltmp", data, "-o", tmp_path / "page.html")
    assert code == 0, errors


def reduce(method, settings, *more):
    return ["reduce", "MODEL", "-o", "OUT", "-r", method, "--reduction-args", json.dumps(settings), *more]


TRAIN = ["train", "MODEL", "--train-dir", "PHOTOS", "-o", "OUT"]
OPTIONS = {
    "share and r": (reduce("tome", {"r": 8}, "--share", 0.65), "share of 0.65 decides r"),
    "share and rate": (reduce("bat", {"keep_rate": 0.5}, "--share", 0.65), "decides keep_rate"),
    "share and target": (reduce("ltmp", {"target": 0.9}, "--share", 0.5, "--images", "PHOTOS"), "decides target"),
    "method": (reduce("tome", {"method": "evit"}), "ToMeConfig has no method"),
    "hook": (reduce("tome", {"hook": "x"}), "ToMeConfig has no hook"),
    "no folder": (["reduce", "MODEL", "-r", "tome", "-o", ""], "is not empty|is empty"),
    "share alone": ([*TRAIN, "--share", 0.5], "there is none. Give one"),
    "no samples": ([*TRAIN, "--max_train_samples", 0], "max_train_samples must be at least 1"),
    "calibrate": (["calibrate", "MODEL", "PHOTOS", "-o", "OUT"], "has nothing to calibrate"),
    "nowhere": (["evaluate", "MODEL", "nowhere-at-all"], "is no folder here"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_meant(call, place, tmp_path, name):
    arguments, message = OPTIONS[name]
    given = {"MODEL": place / "model", "PHOTOS": place / "photos", "OUT": tmp_path / "out"}
    code, _, errors = call(*[given.get(word, word) for word in arguments])
    assert code == 2 and errors.count("\n") <= 2, errors
    assert any(part in errors for part in message.split("|")), errors
    assert not (tmp_path / "out").exists()


def test_a_model_is_replaced_only_when_asked(call, place, tmp_path):
    arguments = ["reduce", place / "model", "-o", tmp_path / "out", "--reduction-args"]
    assert call(*arguments, '{"r": 2}')[0] == 0
    (tmp_path / "out" / "README.md").write_text("a card by ToMe with r=2")
    code, _, errors = call(*arguments, '{"r": 3}')
    assert code == 2 and "--overwrite" in errors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reduction"]["r"] == 2
    assert call(*arguments, '{"r": 3}', "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reduction"]["r"] == 3
    assert not (tmp_path / "out" / "README.md").exists()


def test_training_replaces_a_model_only_when_asked(call, place, tmp_path):
    out = shutil.copytree(place / "model", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    arguments = ["train", place / "model", "--train-dir", place / "photos", "-o", out, "-r", "tome", "--epochs", 1]
    arguments += ["--batch-size", 4, "--ignore_mismatched_sizes", "--use_cpu", "True", "--disable_tqdm", "True"]
    code, _, errors = call(*arguments)
    assert code == 2 and "holds a model" in errors and "--overwrite" in errors
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert call(*arguments, "--overwrite")[0] == 0
    assert json.loads((out / "config.json").read_text())["reduction"]["method"] == "tome"


@pytest.mark.parametrize("content", ["", "{", '{"a": 1'])
def test_a_broken_settings_file_is_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json cannot be read .*give another one"):
        known_settings(tmp_path / "settings.json", {"a": 1})


def test_calibrate(call, place, tmp_path):
    code, _, errors = call(
        "reduce", place / "model", "-r", "ltmp", "--share", 0.8, "--images", place / "photos", "-o", tmp_path / "a"
    )
    assert code == 0, errors
    code, printed, errors = call(
        "calibrate", tmp_path / "a", place / "photos", "--target", 0.6, "-o", tmp_path / "b", "--json"
    )
    found = json.loads(printed)
    assert found["share_when_calibrated"] == pytest.approx(0.6, abs=0.03) and found["settings"]["target"] == 0.6
    inspected = json.loads(call("inspect", tmp_path / "b", "--json")[1])
    assert inspected["share_when_calibrated"] == found["share_when_calibrated"]
    model = load_model(str(tmp_path / "b"))[0]
    model.set_reduction(LTMPConfig())
    assert describe_model(model, "b")["share_when_calibrated"] is None
    assert not hasattr(restore(load_model(str(tmp_path / "b"))[0]).config, "calibrated_share")
    thresholds = load_file(tmp_path / "b" / "model.safetensors")
    assert inspected["learned"]["merges above"] == [
        round(thresholds[f"vit.layers.{layer}.reducer.merge_threshold"].item(), 4) for layer in range(12)
    ]


@pytest.mark.parametrize("what", ["weights", "processor"])
def test_numbers_that_are_not_finite(call, place, tmp_path, what):
    model = shutil.copytree(place / "model", tmp_path / "model")
    if what == "weights":
        weights = load_file(model / "model.safetensors")
        weights["classifier.weight"][0, 0] = float("nan")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        values = json.loads((model / "preprocessor_config.json").read_text())
        (model / "preprocessor_config.json").write_text(json.dumps({**values, "image_std": [0.0, 0.0, 0.0]}))
    code, _, errors = call("evaluate", model, place / "photos")
    assert code == 2 and "row 0 of the data set is not finite" in errors
    code, _, errors = call(
        "reduce", model, "-r", "ltmp", "--share", 0.7, "--images", place / "photos", "-o", tmp_path / "out"
    )
    assert code == 2 and "not finite" in errors and not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_cut_short(call, place, tmp_path):
    arguments = ["train", place / "model", "--train-dir", place / "photos", "-o", tmp_path / "out", "--epochs", 2]
    arguments += ["--batch-size", 4, "--ignore_mismatched_sizes", "--use_cpu", "True", "--disable_tqdm", "True"]
    assert call(*arguments)[0] == 0
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: len(content) // 2])
    code, _, errors = call(*arguments, "--resume", checkpoint)
    assert code == 2 and "cut short or broken" in errors and checkpoint.name in errors


@pytest.mark.slow
def test_two_comparisons_in_one_folder(place, tmp_path):
    """Both end, and the table has every setting."""
    data = shutil.copytree(place / "photos", tmp_path / "data")
    code = "from hf_tokenreduce_cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "compare",
        place / "model",
        data,
        "-o",
        tmp_path / "out",
        "--no-speed",
        "-r",
        "tome",
    ]
    runs = [
        subprocess.Popen([*map(str, command), "--share", str(share)], stderr=subprocess.PIPE, text=True)
        for share in (0.7, 0.8)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {None, "tome"} and len({row["key"] for row in rows}) == 3
    assert not list((tmp_path / "out").rglob("*.part"))


def test_help_does_not_wait_for_torch():
    code = "import sys, hf_tokenreduce_cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_training_shows_a_line_per_epoch(call, place, tmp_path):
    arguments = ["train", place / "model", "--train-dir", place / "photos", "-o", tmp_path / "out", "--epochs", 2]
    code, printed, errors = call(*arguments, "--batch-size", 4, "--ignore_mismatched_sizes", "--use_cpu", "True")
    assert code == 0 and "epoch 1 of 2: loss" in printed + errors and "epoch 2 of 2" in printed + errors
    assert "top-1" in printed + errors and "left" in printed + errors and "Saved to" in printed
    assert torch.accelerator.is_available() or "pin_memory" not in errors


def test_a_disk_that_is_full_changes_nothing(call, place, tmp_path):
    """Files of more than 100 kB cannot be written: configuration and code can, weights cannot."""
    arguments = ["reduce", place / "model", "-r", "tome", "-o", tmp_path / "out", "--reduction-args"]
    assert call(*arguments, '{"r": 2}')[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code += "from hf_tokenreduce_cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments), '{"r": 3}', "--overwrite"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "could not be written" in run.stderr.splitlines()[-1], run.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_sounds_are_not_given_images(call, place, tmp_path):
    reduce_tokens(family_model("ast"), ToMeConfig(r=3)).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(num_mel_bins=64, max_length=64).save_pretrained(tmp_path / "ast")
    for command, message in (
        (["predict", tmp_path / "ast", place / "photos"], "classifies sounds"),
        (["show", tmp_path / "ast", place / "photos", "-o", tmp_path / "page.html"], "takes sounds"),
        (["benchmark", tmp_path / "ast", "--images", place / "photos"], "takes sounds"),
        (["evaluate", tmp_path / "ast", place / "photos"], "takes sounds"),
        (["compare", tmp_path / "ast", place / "photos", "-o", tmp_path / "out"], "takes sounds"),
        (["tune", tmp_path / "ast", place / "photos", "--share", 0.65, "-o", tmp_path / "out"], "takes sounds"),
    ):
        code, _, errors = call(*command)
        assert code == 2 and message in errors, errors


def test_numbers_of_a_benchmark_that_cannot_be(call, place):
    for option in ("--threads", "--batch-size"):
        code, _, errors = call("benchmark", place / "model", "--images", place / "photos", option, 0)
        assert code == 2 and option in errors and "Traceback" not in errors


def test_a_report_needs_the_name_of_a_file(call, place, tmp_path):
    words = ("benchmark", place / "model", "--images", place / "photos", "-o", tmp_path)
    code, _, errors = call(*words)
    assert code == 2 and f"{tmp_path} is a folder. Give --output the name of a file" in errors


def test_names_that_a_console_cannot_show(place, tmp_path):
    """They are written by their codes, and the run goes on."""
    for name in ("a.png", "\u732b.png"):
        shutil.copy(place / "photos" / "c0" / "0.png", tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", "from hf_tokenreduce_cli import main; main()", "predict", place / "model", tmp_path],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "\\u732b.png: " in done.stdout
