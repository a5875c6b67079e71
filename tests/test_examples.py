"""Every example and benchmark runs, on tiny data, as a user would run it."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification, ViTImageProcessor

from hf_tokenreduce import DLViTConfig, LTMPConfig, load_thresholds, reduce_tokens
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.training.origin import shown
from hf_tokenreduce.training.run import DataArguments, ModelArguments, load_data, name_of_validation, parse
from hf_tokenreduce.training.run import load_model as load_model_to_train
from hf_tokenreduce.training.run import main as run_training


HERE = Path(__file__).resolve().parents[1]
EXAMPLES = HERE / "examples"


@pytest.fixture
def run(capsys):
    """An example or a benchmark by its `main`, which reads its command line; returns what it printed."""

    def run(name, *arguments):
        capsys.readouterr()
        file = next(folder / name for folder in (EXAMPLES, HERE / "benchmarks") if (folder / name).is_file())
        runpy.run_path(str(file))["main"]([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def model_and_images(tmp_path):
    model = tiny_model()
    model.config.id2label = dict(enumerate(["cat", "dog", "owl", "hen", "fox"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    for name in ("cat", "0001_dog"):
        folder = tmp_path / "images" / "validation" / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "model", tmp_path / "images"


@pytest.fixture
def deep(tmp_path):
    model = tiny_model(num_hidden_layers=12)
    model.config.label2id = {"cat": 0, "dog": 1}
    model.save_pretrained(tmp_path / "deep")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_sweep_of_bat(tmp_path, deep, model_and_images, run):
    _, images = model_and_images
    arguments = ["--model_name_or_path", deep, "--data_dir", images, "--output_dir", tmp_path / "sweep"]
    arguments += ["--keep_rates", 0.5, "--cluster_shares", 0.2, 0.4, "--fuse_shares", 0.5]
    printed = run("sweep_bat.py", *arguments)
    assert "| 0.4 |" in printed and printed == (tmp_path / "sweep" / "bat_sweep_deep.md").read_text() + "\n"
    assert len((tmp_path / "sweep" / "deep" / "results.jsonl").read_text().splitlines()) == 5  # and the dense model


def test_table_of_training_free_methods(tmp_path, deep, model_and_images, run):
    _, images = model_and_images
    arguments = [
        "--models",
        deep,
        "--data_dir",
        images,
        "--output_dir",
        tmp_path / "table",
        "--methods",
        "tome",
        "ats",
    ]
    run("training_free_table.py", *arguments, "--shares", 0.6, 0.001)
    file = tmp_path / "table" / "training-free-odd.json"
    first = json.loads(file.read_text())
    rows = {(row["method"], row["share"]): row for row in first["results"]}
    assert list(rows) == [(None, 1.0), ("tome", 0.6), ("ats", 0.6), ("tome", 0.001), ("ats", 0.001)]
    assert first["settings"]["images"] == 4 and 0.5 < rows["tome", 0.6]["kept"] <= 0.6
    drop = rows[None, 1.0]["top1"] - rows["tome", 0.6]["top1"]
    low, high = rows["tome", 0.6]["drop_interval"]
    assert rows["tome", 0.6]["drop"] == drop and low <= drop <= high
    assert rows["tome", 0.6]["agreement"] in (0, 25, 50, 75, 100) and rows["tome", 0.6]["divergence"] > 0
    assert "cannot be reached" in rows["tome", 0.001]["left_out"]
    assert str(tmp_path) not in file.read_text()

    first["results"][1]["top1"] = 12.3  # what is there is not measured again
    file.write_text(json.dumps(first))
    printed = run("training_free_table.py", *arguments, "--shares", 0.6)
    assert json.loads(file.read_text()) == first and "| ToMe | **12.3** (" in printed
    for name in ("more.png", "one_more.png"):
        Image.new("RGB", (9, 9)).save(images / "validation" / "cat" / name)
    with pytest.raises(ValueError, match="images was 4, now 5"):
        run("training_free_table.py", *arguments)


def test_thresholds_that_ship(tmp_path, deep, model_and_images, run, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    _, images = model_and_images
    arguments = ["--models", deep, "--data_dir", images, "--shares", 0.7, "--output_dir", tmp_path / "made"]
    assert "deep-ltmp-0.7.safetensors: keeps 0." in run("make_thresholds.py", *arguments)
    model = reduce_tokens(load_model(deep)[0], LTMPConfig(target=0.7))
    load_thresholds(model, tmp_path / "made" / "deep-ltmp-0.7.safetensors")
    counts = model.eval()(torch.randn(2, 3, 32, 32), output_patch_map=True).token_counts
    assert (counts[:, :3] == 65).all() and (counts[:, -1] < 65).all()


@pytest.mark.slow
def test_times_of_training_free_methods(tmp_path, model_and_images, run):
    pytest.importorskip("onnxruntime")
    model, images = model_and_images
    arguments = ["--models", model, "--data_dir", images, "--output_dir", tmp_path, "--methods", "tome", "ats"]
    printed = run("training_free_table.py", *arguments, "--shares", 0.6, "--speed", "--repeats", 1)
    found = json.loads((tmp_path / "training-free-odd.json").read_text())
    assert found["speed"][0]["eager"].keys() == {"tome", "ats"} and found["speed"][0]["onnxruntime"].keys() == {"tome"}
    assert printed.count("onnxruntime") == 1 and printed.count(", eager") == 2


def test_starts_of_sit(model_and_images, run):
    model, images = model_and_images
    folders = ["--train_dir", images / "validation", "--validation_dir", images / "validation"]
    settings = ["--steps", 2, "--eval_steps", 1, "--batch_size", 4, "--layers", 1, 2]
    printed = run("compare_sit_starts.py", "--model_name_or_path", model, *folders, *settings)
    assert [line.count("|") for line in printed.splitlines()] == [5, 5, 5, 5]


def test_measure_differences(deep, model_and_images, run):
    _, images = model_and_images
    printed = run("measure_differences.py", "--model_name_or_path", deep, "--data_dir", images)
    assert printed.count("| yes |") == 10


def test_measure_steps(deep, model_and_images, run):
    _, images = model_and_images
    names = ["--model_name_or_path", deep, "--data_dir", images]
    printed = run("measure_steps.py", *names, "--batch_size", 2, "--repeats", 1)
    assert "| dense |" in printed and "| LTMP, frozen backbone |" in printed


def test_loader_speed(tmp_path, model_and_images, run):
    model, images = model_and_images
    (images / "validation").rename(images / "train")
    arguments = ["--model_name_or_path", model, "--train_dir", images / "train", "--workers", 0, 1]
    arguments += ["--batch_size", 2, "--batches", 2, "--augmentation", "strong"]
    printed = run("loader_speed.py", *arguments, "--output_file", tmp_path / "speed.json")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["loader"].keys() == {"0", "1"} and found["step"].keys() == {"dense", "tome"}
    assert all(speed > 0 for kind in ("loader", "step") for speed in found[kind].values())
    assert printed.count("images/s") == 4


def test_compare_labellers(model_and_images, run):
    model, images = model_and_images
    printed = run("compare_labellers.py", "--model_name_or_path", model, "--data_dir", images, "--max_samples", 3)
    rows = [line.split("|")[1:5] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["exact", "groups", "exact", "groups", "gradient"]
    assert rows[0][3].strip() == rows[2][3].strip() == "1.00" and all(-1 <= float(row[3]) <= 1 for row in rows)


def test_rank_patches(tmp_path, model_and_images, run):
    """The record has every ranking, and the numbers are those of loops over pairs of patches."""
    model, images = model_and_images
    filtered = reduce_tokens(tiny_model(), DLViTConfig(keep_rate=0.5))
    filtered.save_pretrained(tmp_path / "filtered")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "filtered")
    words = ["--model_name_or_path", model, "--filter_model", tmp_path / "filtered", "--data_dir", images]
    words += ["--max_samples", 5, "--output_dir", tmp_path / "made"]
    printed = run("rank_patches.py", *words, "--keep_share", 0.5)
    record = json.loads((tmp_path / "made" / f"rank-patches-{tmp_path.name}-model.json").read_text())
    assert record["images"] == 5 and len(record["rows"]) == 1 + 2 * 4 and "| filter |" in printed
    assert all(row["auc_interval"][0] <= row["auc"] <= row["auc_interval"][1] for row in record["rows"].values())

    per_image = runpy.run_path(str(HERE / "benchmarks" / "rank_patches.py"))["per_image"]
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    keep = torch.tensor([[True, False, True, False], [True, False, False, False], [True] * 4])
    auc, precision = per_image(scores, keep, 2)
    for row in range(2):
        pairs = [(a, b) for a, k in zip(scores[row], keep[row], strict=True) if k
                 for b, d in zip(scores[row], keep[row], strict=True) if not d]  # fmt: skip
        assert auc[row] == pytest.approx(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
    assert auc[2] != auc[2] and precision.tolist()[1:] == [0.0, 1.0]


@pytest.fixture
def class_folders(tmp_path, model_and_images):
    """A training folder whose classes can be told apart by their colour."""
    for split, count in (("train", 12), ("val", 6)):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 156, (40, 36, 3), dtype=torch.uint8)
                pixels[..., index] += 100
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return model_and_images[0], tmp_path / "data"


def train(model, data, output, *arguments, launcher=None):
    command = ["--model_name_or_path", model, "--use_cpu", "True"]
    command += ["--train_dir", data / "train", "--validation_dir", data / "val", "--output_dir", output, *arguments]
    command += ["--disable_tqdm", "True"]
    if "--per_device_train_batch_size" not in arguments:
        command += ["--per_device_train_batch_size", 6]
    command = [str(part) for part in command]
    if launcher is None:
        run_training(command)
    else:
        command = [*launcher, str(EXAMPLES / "run_image_classification.py"), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    return json.loads((output / "record.json").read_text())


def test_training_from_a_dense_baseline_to_a_reduced_model(tmp_path, class_folders):
    model, data = class_folders
    settings = ["--ignore_mismatched_sizes", "--num_train_epochs", 3, "--learning_rate", 1e-3]
    first = train(model, data, tmp_path / "dense", *settings, launcher=[sys.executable])
    assert first["method"] is None and first["mult_adds_ratio"] == 1.0 and first["baseline_top1"] is None
    layers = '{"layers": [1, 2]}'
    reduction = ["--reduction", "bat", "--share", 0.7, "--reduction_args", layers]
    record = train(tmp_path / "dense", data, tmp_path / "bat", *reduction)
    assert record["baseline_top1"] == first["top1"] and record["settings"]["layers"] == [1, 2]
    assert 0.6 < record["mult_adds_ratio"] <= 0.7 and len(record["tokens_per_layer"]) == 4
    assert (tmp_path / "bat" / "preprocessor_config.json").is_file()
    assert (tmp_path / "bat" / "modeling_tokenreduce.py").is_file()
    assert (record["dataset"], record["eval_dataset"]) == ("data/train", "data/val")
    held_out = name_of_validation(DataArguments(train_dir="some/data/train"))
    assert held_out == "data/train (a part held out)"
    # reduced already: it is trained on
    again = train(tmp_path / "bat", data, tmp_path / "again", "--num_train_epochs", 1, "--augmentation", "strong")
    assert again["settings"] == record["settings"]
    assert again["base_model"] == first["base_model"]
    assert again["earlier_commands"] == [first["command"], record["command"]]
    with pytest.raises(ValueError, match="filter has to be fitted first"):
        train(tmp_path / "dense", data, tmp_path / "filter", "--reduction", "dlvit", "--share", 0.5)
    with pytest.raises(ValueError, match=r"The data has 2 classes, \['cat', 'dog'\], the model 5"):
        train(model, data, tmp_path / "wrong")


def test_resumed_at_the_end_of_an_epoch_is_uninterrupted(tmp_path, class_folders):
    model, data = class_folders
    settings = [
        "--ignore_mismatched_sizes",
        "--reduction",
        "tome",
        "--num_train_epochs",
        2,
        "--augmentation",
        "strong",
    ]
    whole = train(model, data, tmp_path / "whole", *settings, "--save_total_limit", 2)
    first = tmp_path / "whole" / "checkpoint-4"
    resumed = train(model, data, tmp_path / "resumed", *settings, "--resume_from_checkpoint", first)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert resumed["top1"] == whole["top1"] and resumed["epochs"] == 2
    with pytest.raises(
        ValueError, match=r"holds checkpoint-8 of a training\. To go on, pass --resume_from_checkpoint"
    ):
        train(model, data, tmp_path / "whole", *settings)  # its first save would delete the others
    (tmp_path / "whole" / "checkpoint-8" / "trainer_state.json").unlink()  # the last that is written
    with pytest.raises(ValueError, match="holds checkpoint-4 of a training"):
        train(model, data, tmp_path / "whole", *settings)
    assert resumed["seconds"] is None and whole["seconds"] > 0


@pytest.mark.parametrize("method", ["ltmp", "sit"])
def test_training_with_lora_and_merging(tmp_path, class_folders, method):
    model, data = class_folders
    train(model, data, tmp_path / "base", "--ignore_mismatched_sizes", "--num_train_epochs", 0)
    extra = ["--share", 0.8] if method == "ltmp" else ["--reduction_args", '{"layers": [1]}', "--token_weight", 0]
    extra += ["--learning_rate", 1e-3, "--num_train_epochs", 1, "--hub_token", "hf_nobody"]
    record = train(tmp_path / "base", data, tmp_path / "out", "--lora", "True", "--reduction", method, *extra)
    assert "--hub_token ***" in record["command"] and "hf_nobody" not in json.dumps(record)
    before = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name, value in load_file(tmp_path / "out" / "model.safetensors").items()
               if name in before and not torch.equal(value, before[name])}  # fmt: skip
    assert any("q_proj" in name for name in changed) and "classifier.weight" in changed
    if method == "ltmp":
        (left,) = (tmp_path / "out").glob("checkpoint-*")
        again = ["--share", 0.5, "--num_train_epochs", 2, "--resume_from_checkpoint", left]
        with pytest.raises(ValueError, match="is a checkpoint of LTMPConfig"):
            train(tmp_path / "base", data, tmp_path / "out", "--lora", "True", "--reduction", method, *again)
    with pytest.raises(ValueError, match="new head for these classes"):
        train(model, data, tmp_path / "no", "--ignore_mismatched_sizes", "--reduction", method, "--share", 0.8)
    assert record["method"] == method and record["mult_adds_ratio"] < 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    "words", [["--hub-token", "hf_nobody"], ["--hub-token=hf_nobody"], ["--api_key", "hf_nobody x"]]
)
def test_no_spelling_of_a_secret_is_told(words):
    assert (
        "hf_nobody" not in shown(["train", *words, "--token_weight", "2"])
        and shown(["--token_weight", "2"])[-1] == "2"
    )
    for word in ("/home/a/b/out", "--output-dir=/home/a/b/out", "-o/home/a/b/out"):
        assert "home" not in shown(["train", word]) and shown(["train", word]).endswith("b/out")
    with pytest.raises(ValueError, match="not used"):  # a shortened one would not be known as a secret
        parse(["--output_dir", "out", "--model_name_or_path", "x", "--hub_tok", "hf_nobody"])


def test_weights_in_a_half_type_are_trained_in_float32(tmp_path, class_folders):
    model, _ = class_folders
    half = AutoModelForImageClassification.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    given, _, _ = load_model_to_train(ModelArguments(str(tmp_path / "half")), list(half.config.label2id))
    assert half.dtype == torch.bfloat16 and {p.dtype for p in given.parameters()} == {torch.float32}


def test_every_seed_holds_out_the_same_images(class_folders):
    _, data = class_folders
    held_out = [
        [file["path"] for file in load_data(DataArguments(train_dir=str(data / "train")), seed)[1]["image"]]
        for seed in (0, 1)
    ]
    assert held_out[0] and held_out[0] == held_out[1]


def test_a_share_of_a_method_that_depends_on_the_images(tmp_path, class_folders):
    """Training finds ATS's number of samples on images of the training data."""
    model, data = class_folders
    extra = ["--ignore_mismatched_sizes", "--num_train_epochs", 0, "--reduction", "ats", "--share", 0.7]
    record = train(model, data, tmp_path / "out", *extra, "--reduction_args", '{"layers": [1, 2]}')
    assert record["settings"]["layers"] == [1, 2] and 0.6 < record["mult_adds_ratio"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "bat", "sit", "ats", "ltmp"])
def test_two_processes_train_as_one(tmp_path, class_folders, method):
    model, data = class_folders
    train(model, data, tmp_path / "base", "--ignore_mismatched_sizes", "--num_train_epochs", 0)
    trains_as_one(tmp_path / "base", data, tmp_path, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "ltmp"])
def test_two_processes_train_another_family_as_one(tmp_path, class_folders, method):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, image_size=32, patch_size=4,
        label2id={"cat": 0, "dog": 1}, id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    trains_as_one(tmp_path / "base", class_folders[1], tmp_path, method)


def trains_as_one(model, data, tmp_path, method):
    arguments = ["--reduction", method, "--num_train_epochs", 2, "--augmentation", "none"]
    if method in ("bat", "sit", "ats"):
        arguments += ["--reduction_args", '{"layers": [1, 2]}']
    arguments += ["--lr_scheduler_type", "constant"]
    # On CPUs without MPI, this flag is what makes `accelerate launch` start processes that find each other.
    two = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        two += ["--main_process_port", str(free.getsockname()[1])]
    both = [*arguments, "--ddp_backend", "gloo", "--per_device_train_batch_size", 12]
    train(model, data, tmp_path / "two", *both, launcher=two)
    train(model, data, tmp_path / "one", *arguments, "--per_device_train_batch_size", 24)
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-5)


def test_no_script_is_taken_for_a_package():
    """The folder of a script is searched first: a script named like a package that torch tries to import hides it."""
    code = """if True:
        import sys
        class Asked:
            def find_spec(self, name, path=None, target=None):
                print(name)
        sys.meta_path.insert(0, Asked())
        import torch, transformers.models.vit.modeling_vit, hf_tokenreduce
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    scripts = {file.stem for folder in (EXAMPLES, HERE / "benchmarks") for file in folder.glob("*.py")}
    assert done.returncode == 0 and not scripts & set(done.stdout.split()), done.stderr


def test_what_is_for_a_cuda_device_runs_on_the_cpu(run, monkeypatch, tmp_path):
    """All of its parts, one of them in its own process; a run that was stopped goes on, and what fails is told."""
    options = ["--smoke", "--output_dir", tmp_path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)  # this process goes on
    start, started = subprocess.Popen, []

    def run_part(command, env):
        """Run other parts than those that wait for their turn here, because each process takes seconds to import
        torch."""
        started.append(command[command.index("--part") + 1])
        if started[-1] == "compiled":
            return start([*command[:-3], "0", "2", command[-1]], env=env)  # one of two processes, so it waits
        runpy.run_path(command[1])["main"](command[2:])
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.syspath_prepend(HERE / "benchmarks")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", run_part)
        printed = run("cuda_device.py", *options)
    stages = ["correct", "waits", "compiled", "weighing", "merging", "speed_recorded", "speed", "profile"]
    assert started == stages
    assert "Failed: nothing." in printed, printed
    found = json.loads((tmp_path / "cuda-smoke.json").read_text())
    rows = {part: {row["key"]: row["found"] for row in rows} for part, rows in found["parts"].items()}
    for key, one in rows["correct"].items():  # rounded, an image may merge other tokens; that depends on the processor
        name, most = ("error", 1e-4) if "float32" in key else ("error_of_same", 0.01)
        assert "error" not in one or (one.get(name, one["error"]) < most and one.get("same_tokens", 1) >= 0.75), key
    assert "dtem, float32" in rows["correct"] and "dtem" in rows["waits"]
    assert all(one["error"] == 0 and one["graphs"] == 1 for one in rows["compiled"].values())
    assert all(one["waits"] <= one["layers"] for one in rows["waits"].values())
    assert [rows["waits"][name]["waits"] for name in ("tome", "dlvit-even", "dlvit")] == [0, 0, 1]
    assert {row["name"] for row in rows["speed"]["tiny, batch 3, eager"]} == {"dense", "tome", "ats"}
    assert {row["name"] for row in rows["speed_recorded"]["tiny, batch 3, recorded"]} == {"dense", "tome"}
    assert all(one["error"] < 0.01 for one in rows["merging"].values())
    assert all(one["over_dense"] > 0 for one in rows["compiled"].values())
    speeds = {"ms", "dense_ms", "over_dense", "of_oracle", "over_eager", "seconds_to_compile"}
    assert len(rows["compiled"]) == 1 and all(speeds <= one.keys() for one in rows["compiled"].values())
    assert not (tmp_path / "cuda-smoke.parts" / "turns").exists()
    table = (tmp_path / "cuda-smoke.md").read_text()
    assert "| tiny, batch 3, eager | ats |" in table and "- tome, float32: error" in table

    part = tmp_path / "cuda-smoke.parts" / "weighing-0.jsonl"
    known, left = part.read_text(), json.dumps({"key": "a", "failed": "ValueError: no"}) + '\n{"key": "half\n'
    for before, after in ((known, known), (left, None)):  # what is there is not done again, what is missing is
        part.write_text(before)
        run("cuda_device.py", *options, "--part", "weighing")
        assert part.read_text() == after or (after is None and len(part.read_text().splitlines()) == 3)
