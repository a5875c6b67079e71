"""The command line: every command on tiny data, its help, and its errors."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import METHODS as METHOD_ROWS
from helpers import tiny_model
from PIL import Image
from task_models import CASES
from transformers import AutoModelForImageClassification, ViTImageProcessor

import hf_tokenreduce_cli
from hf_tokenreduce import ATSConfig, reduce_tokens
from hf_tokenreduce.hub import check_folder
from hf_tokenreduce.loading import load_model, load_pictures
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.methods.fitting import share_on
from hf_tokenreduce_cli import app, main


COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of 12 layers, and labelled images."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model(num_hidden_layers=12)
    names = ["cat", "dog", "owl", "hen", "fox"]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for name in names[:3]:
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    return folder


def answer(call, *arguments):
    code, printed, errors = call(*arguments)
    assert code == 0, errors
    return json.loads(printed)


@pytest.fixture(scope="module")
def reduced(place):
    with pytest.raises(SystemExit):
        main(["reduce", str(place / "model"), "-r", "tome", "--share", "0.7", "-o", str(place / "tome")])
    return place / "tome"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen_and_has_an_example(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed, _ = call(*([command] if command else []), "--help")
    assert code == 0 and printed.count("\n") <= 45
    if command:
        assert f"tokenreduce {command}" in printed.split("--help")[-1]  # after the options


def test_reduce_and_inspect(call, place, reduced):
    found = answer(call, "inspect", reduced, "--json")
    assert found["method"] == "tome" and 0.6 < found["share"] <= 0.75
    assert len(found["tokens_per_layer"]) == 12 and found["tokens_per_layer"][-1] < 65
    stock = answer(call, "inspect", place / "model", "--json")
    assert stock["method"] is None and stock["share"] == 1 and stock["parameters"] == found["parameters"]
    code, printed, _ = call("inspect", reduced)
    assert code == 0 and "ToMe" not in printed and "tome" in printed


def test_reduce_calibrates_on_images(call, place):
    output = place / "ltmp"
    arguments = ["reduce", place / "model", "-r", "ltmp", "--share", 0.7, "-o", output]
    code, _, errors = call(*arguments)
    assert code == 2 and "pass --images FOLDER" in errors and not output.exists()
    found = answer(call, *arguments, "--images", place / "photos", "--json")
    assert found["settings"]["target"] == 0.7 and found["tokens_per_layer"] is None
    model = AutoModelForImageClassification.from_pretrained(output)
    assert len({layer.reducer.merge_threshold.item() for layer in model.vit.layers}) > 1


def test_reduce_fits_a_sampler_to_a_share_of_images(call, place):
    arguments = ["reduce", place / "model", "-r", "ats", "--share", 0.5, "-o", place / "ats"]
    code, _, errors = call(*arguments)
    assert code == 2 and "--images FOLDER" in errors and not (place / "ats").exists()
    found = answer(call, *arguments, "--images", place / "photos", "--json")
    model, processor = load_model(str(place / "ats"))
    pixels = processor(load_pictures([str(place / "photos")], 100)[0], return_tensors="pt")["pixel_values"]
    setting = ATSConfig(**{name: value for name, value in found["settings"].items() if name != "method"})
    more = reduce_tokens(model, replace(setting, num_tokens=setting.num_tokens + 1))
    assert share_on(reduce_tokens(model, setting), pixels) <= 0.5 < share_on(more, pixels)
    arguments[arguments.index(0.5)] = 0.95  # more than the scores keep by themselves
    found = answer(call, *arguments[:-1], place / "ats-all", "--images", place / "photos", "--json")
    assert found["settings"]["num_tokens"] is None


@pytest.mark.parametrize("name", ["clip-classifier", "siglip-classifier", "clip-vision"])
def test_an_image_side_of_clip_needs_no_tokenizer(call, tmp_path, name):
    """Its configuration names a tokenizer, or its text side has more layers than the model."""
    CASES[name].make().save_pretrained(tmp_path / "stock")
    CASES[name].processor().save_pretrained(tmp_path / "stock")
    found = answer(call, "reduce", tmp_path / "stock", "-r", "topk", "--reduction-args", '{"layers": [1]}',
                   "-o", tmp_path / "reduced", "--json")  # fmt: skip
    assert found["method"] == "topk" and not list((tmp_path / "reduced").glob("tokenizer*"))
    report = check_folder(tmp_path / "reduced", load=False)
    assert report.ok, report.errors


def test_a_benchmark_prepares_images_as_each_model_needs(call, place, tmp_path, monkeypatch):
    """It matters where the image decides how many tokens stay."""
    # Each model would start a process that imports torch; test_evaluation_speed.py measures memory.
    monkeypatch.setattr("hf_tokenreduce.evaluation.speed.peak_memory", lambda model, images: 1.0)
    for name, method, mean in (("a", "tome", 0.5), ("b", "tome", 0.4), ("c", "ats", 0.4)):
        model = reduce_tokens(tiny_model(), METHOD_ROWS[method][0])
        model.save_pretrained(tmp_path / name)
        processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[mean] * 3)
        processor.save_pretrained(tmp_path / name)
    options = ["--images", place / "photos", "--batch-size", "1", "--repeats", "1", "--no-suggest", "--json"]
    assert len(answer(call, "benchmark", tmp_path / "a", tmp_path / "b", *options)["rows"]) == 3
    code, _, errors = call("benchmark", tmp_path / "a", tmp_path / "c", *options)
    assert code == 2 and "The image processors of a and c differ" in errors


def test_reduce_saves_nothing_that_reduces_nothing(call, place):
    for share in ([], ["--share", 0.65]):
        code, _, errors = call("reduce", place / "model", "-r", "dlvit", *share, "-o", place / "dlvit")
        assert code == 2 and "filter is not trained" in errors and "run_delta_loss.py" in errors
    assert not (place / "dlvit").exists()


def test_methods_are_listed(call):
    assert [row["name"] for row in answer(call, "methods", "--json")] == list(METHODS)
    code, printed, _ = call("methods")
    assert code == 0 and all(method.title in printed for method in METHODS.values())


def test_evaluate(call, place, reduced):
    found = answer(call, "evaluate", reduced, place / "photos", "--json")
    assert found["images"] == 12 and 0 <= found["top1"] <= 100 and found["baseline_top1"] is not None
    fewer = answer(call, "evaluate", reduced, place / "photos", "--limit", 6, "--dense", place / "model", "--json")
    assert fewer["images"] == 6
    trained = shutil.copytree(reduced, place / "trained-already")
    (trained / "record.json").write_text(json.dumps({"method": "tome", "epochs": 3.0}))
    beside = ["--dense", place / "model"]
    for folder, options, warns in ((trained, [], True), (trained, beside, False), (reduced, [], False)):
        errors = call("evaluate", folder, place / "photos", "--limit", 3, *options)[2]
        assert ("give --dense, a dense model that was trained as long" in errors) is warns


def test_benchmark(call, place, reduced, monkeypatch):
    monkeypatch.setattr("hf_tokenreduce.evaluation.speed.peak_memory", lambda model, images: 1.0)
    shutil.copytree(reduced, place / "other" / "tome", dirs_exist_ok=True)
    options = ["--images", place / "photos", "--batch-size", 2, "--repeats", 1, "--no-suggest"]
    arguments = ["benchmark", reduced, place / "other" / "tome", *options]
    found = answer(call, *arguments, "--device", "cpu", "-o", place / "speed.json", "--json")
    assert len({row["name"] for row in found["rows"]}) == 3
    assert json.loads((place / "speed.json").read_text()) == found
    shutil.copytree(reduced, place / "other" / "dense")
    code, _, errors = call("benchmark", place / "other" / "dense", *options)
    assert code == 2 and "called 'dense' is reduced" in errors


def test_compare(call, place):
    arguments = ["compare", place / "model", place / "photos", "-o", place / "comparison", "--no-speed"]
    found = answer(call, *arguments, "-r", '{"method": "tome", "r": 4}', "-r", '{"method": "ats"}', "--json")
    assert [row["method"] for row in found] == [None, "tome", "ats"]
    assert (place / "comparison" / "pareto.png").is_file()
    named = answer(call, *arguments, "-r", "tome", "--share", 0.7, "--json")
    assert [row["method"] for row in named] == [None, "tome"] and 0.6 < named[1]["mult_adds_ratio"] <= 0.7
    code, _, errors = call(*arguments, "-r", '{"r": 4}')
    assert code == 2 and "Unknown reduction method None. The methods are: " in errors
    assert "A setting names its method, such as {'method': 'tome', 'r': 13}" in errors
    code, _, errors = call(*arguments, "-r", "dlvit")
    assert code == 2 and "dlvit has no untrained setting" in errors
    code, printed, errors = call(*arguments, "--share", 0.6, "--limit", 12)
    assert code == 0 and "BAT" in printed and "LTMP" in printed and "for which they were not trained" not in errors


def test_compare_says_that_a_model_was_trained_with_its_reduction(call, place, reduced):
    trained = shutil.copytree(reduced, place / "trained-to-compare")
    (trained / "record.json").write_text(json.dumps({"method": "tome", "epochs": 3.0}))
    options = ["-o", place / "of-trained", "--no-speed", "-r", '{"method": "tome", "r": 4}']
    code, _, errors = call("compare", trained, place / "photos", *options)
    assert code == 0 and "the same weights without reduction, for which they were not trained." in errors


def test_show(call, place, reduced):
    for name in ("page.html", "grid.png"):
        code, _, errors = call("show", reduced, place / "photos", "-o", place / name, "--limit", 2)
        assert code == 0, errors
    assert Image.open(place / "grid.png").width > 200
    assert (place / "page.html").read_text().count("<img") >= 2
    (reduced / "record.json").write_text(json.dumps({"method": "tome", "epochs": 3.0}))  # it was trained
    code, printed, errors = call("show", reduced, place / "photos", "-o", place / "trained[final].html", "--limit", 2)
    (reduced / "record.json").unlink()
    assert code == 0 and "trained[final].html" in printed.replace("\n", ""), errors
    assert "dense model" in (place / "page.html").read_text("utf-8")
    assert "dense model" not in (place / "trained[final].html").read_text("utf-8")
    code, _, errors = call("show", reduced, place / "photos", "-o", place / "page.pdf")
    assert code == 2 and "must end in .html or .png" in errors
    code, _, errors = call("show", place / "model", place / "photos", "-o", place / "page.html")
    assert code == 2 and "is not reduced" in errors
    other = shutil.copytree(place / "model", place / "of-other-means")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    code, _, errors = call("show", reduced, place / "photos", "--dense", other, "-o", place / "page.html")
    assert code == 2 and "image processors of" in errors.replace("\n", " ")


def test_card_and_publish(call, place, reduced):
    code, _, errors = call("card", reduced, "--base-license", "apache-2.0")
    assert code == 0 and "license: apache-2.0" in (reduced / "README.md").read_text(), errors
    found = answer(call, "publish", reduced, "someone/tome", "--dry-run", place / "upload", "--json")
    assert found["revision"] is None and set(found["files"]) == {
        str(file.relative_to(place / "upload")) for file in (place / "upload").rglob("*") if file.is_file()
    }
    code, _, errors = call("publish", reduced, "no/such/name", "--dry-run", place / "upload2")
    assert code == 2 and errors.count("\n") == 1 and "namespace/name" in errors
    code, _, errors = call("publish", reduced, "someone/tome")
    assert code == 2 and errors.strip().splitlines()[-1].startswith("tokenreduce: Nothing was sent: HF_HUB_OFFLINE")


def test_train(call, place):
    arguments = ["train", place / "model", "--train-dir", place / "photos", "-o", place / "trained", "-r", "topk"]
    arguments += ["--share", 0.7, "--epochs", 1, "--batch-size", 4, "--ignore_mismatched_sizes", "--use_cpu", "True"]
    code, _, errors = call(*arguments, "--disable_tqdm", "True", "--dataloader_num_workers", 0)
    assert code == 0, errors
    record = json.loads((place / "trained" / "record.json").read_text())
    assert record["method"] == "topk" and record["epochs"] == 1 and record["command"].startswith("tokenreduce train ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere-at-all"], "could not be loaded"),
        (["show", "MODEL", "photos", "-o", "x.png", "--title", "T"], "--dense and --title are for a page"),
        (["card", "MODEL", "--records", "records", "--report", "report.json"], "Leave one of them out"),
        (["train", "MODEL", "--train-dir", "photos", "-o", "x", "--push_to_hub", "True"], "tokenreduce publish x"),
        (["reduce", "MODEL", "-r", "tomme", "-o", "x"], "There is no method 'tomme'. The methods are: "),
        (["reduce", "MODEL", "-r", "bat", "--share", "0.05", "-o", "x"], "cannot be reached"),
        (["reduce", "MODEL", "-r", "bat", "--reduction-args", "{keep}", "-o", "x"], "are not JSON"),
        (["reduce", "MODEL", "-r", "bat", "--reduction-args", '{"keep": 1}', "-o", "x"], "BATConfig has no keep"),
        (["evaluate", "MODEL", "MODEL"], "holds no images"),
        (["show", "MODEL", "photos", "-o", "x.png"], "is not reduced"),
        (["show", "REDUCED", "no-images", "-o", "x.png"], "no-images is neither an image nor a folder of images"),
    ],
)
def test_errors_are_one_line(call, place, reduced, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    models = {"MODEL": str(place / "model"), "REDUCED": str(reduced)}
    arguments = [models.get(argument, argument) for argument in arguments]
    code, printed, errors = call(*arguments)
    assert code == 2 and not printed
    last = errors.strip().splitlines()[-1]
    assert last.startswith("tokenreduce: ") and message in last and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_an_error_came_from(place):
    with pytest.raises(ValueError, match="There is no method"):
        main(["reduce", str(place / "model"), "-r", "tomme", "-o", "x", "--debug"])


def test_trainer_has_a_debug_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(hf_tokenreduce_cli, "app", lambda args, **options: seen.append(args))
    main(["train", "x", "--debug", "underflow_overflow", "--debug"])
    assert seen == [["train", "x", "--debug", "underflow_overflow"]]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AttributeError("a fault of ours"), KeyError("name")])
def test_what_is_not_the_users_keeps_its_traceback(monkeypatch, place, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_tokenreduce.loading.load_model", fails)
    with pytest.raises(type(error)) as raised:
        main(["inspect", str(place / "model")])
    assert raised.value is error


def test_the_same_command_gives_the_same_answer(call, place, reduced):

    first = answer(call, "evaluate", reduced, place / "photos", "--json")
    assert answer(call, "evaluate", reduced, place / "photos", "--json") == first
