"""The table of trained models: its cells, its resumption, its arithmetic."""

import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTImageProcessor

from hf_tokenreduce.loading import load_model


HERE = Path(__file__).resolve().parents[1]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module("train_table"), importlib.import_module("train_report")
    for name in ("train_table", "train_report", "training_free_table"):
        sys.modules.pop(name, None)


@pytest.fixture
def arguments(tmp_path):
    """Give the arguments of a table of a tiny model on twelve images."""
    tiny_model(num_hidden_layers=12).save_pretrained(tmp_path / "tiny")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3), ("tune", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{number}.png")
    words = ["--model_name_or_path", tmp_path / "tiny", "--train_dir", tmp_path / "data" / "train", "--eval_dirs"]
    words += [tmp_path / "data" / "val", tmp_path / "data" / "tune", "--work_dir", tmp_path / "work"]
    words += ["--output_dir", tmp_path / "results", "--seeds", 0, "--shares", 0.65, "--start_epochs", 1]
    return [str(word) for word in words]


def test_the_table_of_a_tiny_model(tmp_path, monkeypatch, modules, arguments, capsys):
    table, _ = modules
    called = []

    def call(script, words, jobs):
        called.append(script)
        runpy.run_path(str(HERE / script))["main"]([str(word) for word in words])

    monkeypatch.setattr(table, "call", call)
    arguments += [
        "--epochs",
        "1",
        "--label_images",
        "4",
        "--methods",
        "tome",
        "dlvit",
        "--variants",
        "bat-no-matching",
    ]
    table.main(arguments)
    folder = tmp_path / "results" / "train-data-tiny"
    rows = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    named = ["start-seed0", "dense-seed0", "tome-0.65-seed0", "dlvit-0.65-seed0", "bat-no-matching-0.65-seed0"]
    assert sorted(rows) == sorted(named) and len(called) == 6  # the filter comes before DL-ViT
    assert rows["bat-no-matching-0.65-seed0"]["settings"]["fuse_share"] == 0
    assert rows["dlvit-0.65-seed0"]["filter"]["images"] == 1
    for name in ("dense-seed0", "tome-0.65-seed0"):
        model, processor = load_model(tmp_path / "work" / name)
        right = []
        for label in ("cat", "dog"):
            for part in ("tune", "val"):  # the order of the links' names
                for file in sorted((tmp_path / "data" / part / label).iterdir()):
                    pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
                    with torch.no_grad():
                        found = model.eval()(pixels).logits.argmax().item()
                    right.append("01"[model.config.id2label[found] == label])
        assert rows[name]["right"] == "".join(right)
        assert rows[name]["top1"] == pytest.approx(10 * right.count("1"))
        assert not list((tmp_path / "work" / name).glob("checkpoint-*"))
    assert rows["dense-seed0"]["mult_adds_ratio"] == 1
    assert rows["tome-0.65-seed0"]["mult_adds_ratio"] == pytest.approx(0.65, abs=0.03)
    text = folder.with_name("train-data-tiny.md").read_text()
    assert "| ToMe | 0.65 | 0.6" in text and "DL-ViT's filter" in text
    assert folder.with_name("train-data-tiny.png").stat().st_size > 5000

    called.clear()
    capsys.readouterr()
    table.main([*arguments, "--list"])
    assert capsys.readouterr().out.count("done") == 5
    table.main(arguments)
    assert not called
    with pytest.raises(ValueError, match="was made with other settings: epochs was 1, now 2"):
        table.main([*arguments, "--epochs", "2"])

    # On another machine the records are there and the models are not: the start of a missing cell is trained again.
    start, cell = folder / "start-seed0.json", folder / "tome-0.65-seed0.json"
    before, weights = start.read_text(), load_file(tmp_path / "work" / "start-seed0" / "model.safetensors")
    cell.unlink()
    shutil.rmtree(tmp_path / "work")
    table.main(arguments)
    again = load_file(tmp_path / "work" / "start-seed0" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert start.read_text() == before and len(called) == 2
    assert json.loads(cell.read_text())["start"] == rows["tome-0.65-seed0"]["start"] == rows["dense-seed0"]["start"]
    assert rows["start-seed0"]["start"] is None and "another machine" not in text
    assert json.loads(cell.read_text())["right"] == rows["tome-0.65-seed0"]["right"]
    assert "out otherwise" not in capsys.readouterr().out
    table.say_what_changed(start, {"right": "".join("10"[int(one)] for one in rows["start-seed0"]["right"])})
    assert "10 of 10 images now come out otherwise" in capsys.readouterr().out


def test_folders_of_work_are_not_mixed(tmp_path, modules, arguments):
    table, _ = modules
    parts = [str(tmp_path / "data" / part) for part in ("val", "tune", "train")]
    assert len(list(table.gather(parts[:2], tmp_path / "links").glob("*/*"))) == 10
    assert len(list(table.gather(parts[2:], tmp_path / "links").glob("*/*"))) == 12  # and none of the others
    with pytest.raises(ValueError, match="have the same name"):
        shutil.copytree(tmp_path / "data", tmp_path / "again")
        table.gather([parts[0], str(tmp_path / "again" / "val")], tmp_path / "links")
    args = table.parse_arguments(arguments)
    setting = table.setting_of(table.Cell("tome", 0.65, 0), args)
    table.belongs(tmp_path / "cell", {**setting, "from": "one"})
    table.belongs(tmp_path / "cell", {**setting, "from": "one"})
    with pytest.raises(ValueError, match="from was 'one', now 'other'"):
        table.belongs(tmp_path / "cell", {**setting, "from": "other"})


def test_cards_name_the_command_that_makes_them_again(modules):
    table, _ = modules
    cards = importlib.import_module("make_cards")
    start = json.loads(next((HERE / "benchmarks" / "results").glob("train-*/start-seed0.json")).read_text())
    for name, changes in (
        ("topk", {"epochs": 5, "label_images": None}),
        ("dlvit", {"label_images": 80, "bf16": True}),
    ):
        row = {
            **start,
            "name": name,
            "share": 0.65,
            "seed": 1,
            "setting": {**start["setting"], "epochs": 3, **changes},
        }
        words = cards.as_record(row, start)["command"].split()[2:]
        args = table.parse_arguments(words)
        (cell,) = [one for one in table.plan(args.seeds, args.shares, args.methods, args.variants) if one.share]
        assert cell == (name, 0.65, 1)
        again = table.setting_of(cell, args)
        assert {key: again[key] for key in changes} == changes and again["start_epochs"] == 4
    sys.modules.pop("make_cards", None)


def test_the_most_telling_cells_come_first(modules):
    table, _ = modules
    cells = [cell.stem for cell in table.plan([0, 1, 2], [0.65, 0.45], table.METHODS, tuple(table.VARIANTS))]
    assert len(cells) == len(set(cells)) == 2 * 16 + 2 * 2 * len(table.VARIANTS) + 2 + 5
    assert cells[:3] == ["start-seed0", "dense-seed0", "tome-0.65-seed0"]
    of_all = [cell.stem for cell in table.plan([0, 1, 2], [0.65, 0.45], table.METHODS, ("topk",), 3)]
    assert len(of_all) == len(set(of_all)) == 3 * 18 and "tome-0.45-seed2" in of_all
    for name in ("start", "dense"):  # what a cell is compared with and begins from is there before it
        assert all(cells.index(f"{name}-seed{cell[-1]}") <= cells.index(cell) for cell in cells if "start" not in cell)


def test_differences_are_paired_by_seed(modules):
    _, report = modules
    generator = np.random.default_rng(0)

    def row(name, seed, right, share=None):
        return {
            "name": name,
            "share": share,
            "seed": seed,
            "right": "".join(map(str, right)),
            "top1": 100 * right.mean(),
            "mult_adds_ratio": share or 1.0,
            "seconds": 60.0,
            "setting": {"epochs": 3},
        }

    rows, differences = [], []
    for seed in (0, 1):
        dense = (generator.random(400) < 0.9).astype(int)
        flipped = generator.random(400) < 0.1
        reduced = np.where(flipped, 1 - dense, dense)
        rows += [row("dense", seed, dense), row("tome", seed, reduced, 0.65), row("start", seed, dense)]
        differences.append(100 * (reduced.mean() - dense.mean()))
    lines = {line["name"]: line for line in report.summarise(rows)}
    assert lines["dense"]["difference"] is None and lines["start"]["difference"] is None
    assert list(lines["tome"]["seeds"].values()) == pytest.approx(differences, abs=0.01)
    assert lines["tome"]["difference"] == pytest.approx(np.mean(differences))
    low, high = lines["tome"]["interval"]
    # Each image of a seed changes by -1, 0 or 1 with variance 0.1 at most: 2 seeds of 400 images.
    width = 2 * 1.96 * 100 * np.sqrt(0.1 / 800)
    between = abs(differences[0] - differences[1])
    assert 0.7 * width < high - low < 1.6 * (width + between) and low < np.mean(differences) < high
    same = [row("dense", 0, dense), row("tome", 0, dense, 0.65)]
    assert report.summarise(same)[1]["interval"] == (0.0, 0.0)
    assert not lines["tome"]["other_start"]
    layers = [same[1] | {"seed": seed, "settings": {"layers": [4 + seed]}} for seed in (0, 1)]
    with pytest.raises(SystemExit, match=r"tome at 0\.65 have different layers"):
        report.summarise([same[0], *layers])
    assert report.summarise([same[0], same[1] | {"start": "of other weights"}])[1]["other_start"]


@pytest.fixture
def trained_beside(modules, arguments, monkeypatch):
    """Give a function that runs the table without training: words, names of cells that fail -> what happened."""
    table, _ = modules

    def run(*words, fails=()):
        happened, lock, reports = [], threading.Lock(), threading.Lock()

        def train(cell, args, held_out):
            with lock:
                happened.append(("begins", cell))
            time.sleep(0.02)
            with lock:
                happened.append(("ends", cell))
            if cell.stem in fails:
                raise subprocess.CalledProcessError(1, "train")
            (args.work_dir / cell.stem).mkdir()
            (args.work_dir / cell.stem / "record.json").touch()
            row = {"name": cell.name, "share": cell.share, "seed": cell.seed, "setting": table.setting_of(cell, args)}
            return row | {"seconds": 60.0, "resumed": False, "jobs": args.jobs}

        def write_report(folder):
            assert reports.acquire(blocking=False), "two threads write the report"
            time.sleep(0.005)
            reports.release()
            return ""

        monkeypatch.setattr(table, "prepare", lambda folder, model: (torch.zeros(1), []))
        monkeypatch.setattr(table, "train", train)
        monkeypatch.setattr(table, "evaluate", lambda *given: {"top1": 50.0, "right": "10"})
        monkeypatch.setattr(table, "write_report", write_report)
        try:
            table.main([*arguments, "--methods", "tome", "dlvit", "--variants", "topk", *words])
        except SystemExit as end:
            return happened, end.code
        return happened, 0

    return run


def running_at(happened):
    """The cells that were in training after each event."""
    running = []
    for event, cell in happened:
        running = [*running, cell] if event == "begins" else [other for other in running if other != cell]
        yield running


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_those_of_drawing_seeds_and_images_anew(modules, seeds):
    _, report = modules
    generator, images = np.random.default_rng(5), 90
    differences = generator.choice([-1, 0, 1], (seeds, images), p=[0.2, 0.7, 0.1])
    means = []
    for _ in range(4000):
        drawn = differences[generator.integers(0, seeds, seeds)]
        means.append(100 * drawn.mean(axis=0)[generator.integers(0, images, images)].mean())
    assert report.interval(differences) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=150 / images / seeds)


def test_cells_are_trained_at_the_same_time(modules, trained_beside, tmp_path, capsys):
    table, _ = modules
    happened, code = trained_beside("--jobs", "4", "--seeds", "0", "1", "--shares", "0.65", "0.45")
    begun = [cell for event, cell in happened if event == "begins"]
    assert code == 0 and len(begun) == len(set(begun)) == 16
    assert max(map(len, running_at(happened))) == 4
    assert {cell.stem for cell in begun[:2]} == {"start-seed0", "start-seed1"}
    for running in running_at(happened):
        assert len({cell.seed for cell in running if cell.name == "dlvit"}) == sum(c.name == "dlvit" for c in running)
    first, second, other = (table.Cell("dlvit", share, seed) for share, seed in ((0.65, 0), (0.45, 0), (0.65, 1)))
    assert not table.may_begin(second, [], [first]) and table.may_begin(other, [second], [first])
    for seed in (0, 1):
        at = [(event, cell.name) for event, cell in happened if cell.seed == seed]
        assert at[:2] == [("begins", "start"), ("ends", "start")]
    rows = [json.loads(file.read_text()) for file in (tmp_path / "results" / "train-data-tiny").glob("*.json")]
    assert len(rows) == 16 and all(row["jobs"] == 4 for row in rows)
    assert "16 cells to go" in capsys.readouterr().out

    happened, code = trained_beside("--seeds", "0", "1", "2", "--shares", "0.65", "0.45")
    assert [cell.stem for event, cell in happened if event == "begins"] == [
        "start-seed2", "dense-seed2", "dlvit-0.65-seed2"
    ]  # what was missing, in the order of the plan  # fmt: skip
    assert max(map(len, running_at(happened))) == 1
    args = table.parse_arguments(
        ["--model_name_or_path", "m", "--train_dir", "t", "--eval_dirs", "e", "--work_dir", "w"]
    )
    cells = [table.Cell("tome", 0.65, seed) for seed in range(6)]
    folder = tmp_path / "results" / "train-data-tiny"
    # Those that ran alone took a minute for one epoch of the start, and for three epochs of each other cell.
    assert table.time_left(folder, cells, args) == ", about 10 minutes" and not table.time_left(tmp_path, cells, args)
    args.jobs = 4
    per_epoch = np.mean([1, 1, *[1 / 3] * 14])
    assert table.time_left(folder, cells, args) == f", about {per_epoch * 18 / 4:.0f} minutes"


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_cell_that_fails_does_not_stop_the_others(trained_beside, tmp_path, jobs, capfd):
    words = ("--jobs", str(jobs), "--seeds", "0", "1")
    happened, code = trained_beside(*words, fails=("start-seed1", "tome-0.65-seed0"))
    folder = tmp_path / "results" / "train-data-tiny"
    done = {file.stem for file in folder.glob("*.json")}
    assert done == {"start-seed0", "dense-seed0", "dlvit-0.65-seed0", "topk-0.65-seed0"}
    assert [cell.stem for event, cell in happened if cell.seed == 1] == ["start-seed1"] * 2
    assert all(f"{name}-seed1" in code for name in ("start", "dense", "tome-0.65")) and "tome-0.65-seed0" in code
    assert "dlvit-0.65-seed0" not in code and "CalledProcessError" in capfd.readouterr().err

    happened, code = trained_beside(*words)
    assert code == 0 and len(list(folder.glob("*.json"))) == 10
    assert not done & {cell.stem for event, cell in happened}


def test_trainings_share_the_cores(modules, monkeypatch):
    table, _ = modules
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in table.environment(1)
    assert table.environment(5)["OMP_NUM_THREADS"] == "3" and table.environment(40)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert table.environment(5)["OMP_NUM_THREADS"] == "2"


def test_runs_on_a_gpu_have_records_of_their_own(tmp_path, modules, arguments, monkeypatch, capsys):
    table, report = modules
    (tmp_path / "results" / "train-data-tiny-cuda").mkdir(parents=True)
    (tmp_path / "results" / "train-data-tiny-cuda" / "start-seed0.json").write_text("{}")
    table.main([*arguments, "--list"])
    assert "done" not in capsys.readouterr().out
    table.main([*arguments, "--device", "cuda", "--list"])
    assert "done     start-seed0" in capsys.readouterr().out

    args = table.parse_arguments([*arguments, "--device", "cuda", "--dataloader_num_workers", "2"])
    cell = table.Cell("tome", 0.65, 0)
    words = [str(word) for word in table.training(cell, args, tmp_path, tmp_path, None)]
    given = {"use_cpu": "False", "bf16": "True", "dataloader_num_workers": "2", "max_eval_samples": "32"}
    for name, value in given.items():
        assert words[words.index(f"--{name}") + 1] == value
    assert table.setting_of(cell, args)["dataloader_num_workers"] == 2  # the workers draw other crops
    args = table.parse_arguments(arguments)
    assert table.setting_of(cell, args)["dataloader_num_workers"] is None
    assert "--dataloader_num_workers" not in table.training(cell, args, tmp_path, tmp_path, None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert table.machine_of("cuda").startswith("NVIDIA H100, ") and table.machine_of("cpu").startswith("cpu, ")
    with pytest.raises(SystemExit):
        table.parse_arguments([*arguments, "--jobs", "0"])

    setting = {"model": "tiny", "train": "data/train", "eval": ["data/val"], "epochs": 3, "bf16": True}
    row = {"name": "dense", "share": None, "seed": 0, "right": "10", "top1": 50.0, "mult_adds_ratio": 1.0}
    row |= {"seconds": 45.0, "setting": setting | {"device": "cuda"}, "machine": table.machine_of("cuda")}
    text = report.to_markdown([row], report.summarise([row]))
    assert "# tiny trained on data/train, on a GPU" in text and "on NVIDIA H100, evaluated" in text
    assert "| 0.8 |" in text and "shared the machine" not in text  # minutes
    row |= {"jobs": 12}
    assert "Up to 12 runs shared the machine" in report.to_markdown([row], report.summarise([row]))


@pytest.mark.slow
def test_killed_and_called_again_it_is_as_if_it_had_not_been(tmp_path, arguments):
    """Also where the kill comes in the midst of an epoch: that epoch begins anew."""
    command = [sys.executable, "benchmarks/train_table.py", *arguments, "--epochs", "3", "--methods", "tome"]
    command += ["--variants"]
    quiet = {"cwd": HERE, "env": os.environ | {"PYTHONPATH": str(HERE)}, "stdout": subprocess.DEVNULL}
    subprocess.run(command, check=True, **quiet)
    whole = tmp_path / "work" / "tome-0.65-seed0" / "model.safetensors"
    expected = load_file(whole)
    right = json.loads((tmp_path / "results" / "train-data-tiny" / "tome-0.65-seed0.json").read_text())["right"]

    command[command.index("--work_dir") + 1] = str(tmp_path / "again")
    command[command.index("--output_dir") + 1] = str(tmp_path / "results-again")
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    out = tmp_path / "again" / "tome-0.65-seed0"
    deadline = time.monotonic() + 240
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "record.json").is_file(), "it had ended before it was killed"
    subprocess.run(command, check=True, **quiet)
    row = json.loads((tmp_path / "results-again" / "train-data-tiny" / "tome-0.65-seed0.json").read_text())
    assert row["resumed"] and row["right"] == right
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 32
