"""Methods of others: they work in every room, and their file travels with the model."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import tiny_images, tiny_model
from PIL import Image
from transformers import PreTrainedModel, ViTImageProcessor

from hf_tokenreduce import Method, ToMeConfig, calibrate, reduce_tokens, register_method
from hf_tokenreduce.hub import check_folder, write_card
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.methods.register import register_from_folder
from hf_tokenreduce.modeling.configuration_base import ReductionConfig
from hf_tokenreduce.modeling.hooks import Reducer
from hf_tokenreduce.modeling.methods import METHOD_CLASSES
from hf_tokenreduce.training.run import load_model as training_model
from hf_tokenreduce.training.run import parse
from hf_tokenreduce.visualization import token_maps
from hf_tokenreduce_cli import main


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FRESH = """
import sys
sys.modules["hf_tokenreduce"] = None  # importing it fails
import torch
from transformers import AutoModelForImageClassification, pipeline
folder, inputs, outputs = sys.argv[1:4]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(folder + "-again")
again = AutoModelForImageClassification.from_pretrained(folder + "-again", trust_remote_code=True).eval()
images = torch.load(inputs)
with torch.no_grad():
    torch.save([m(images).logits for m in (model, again)], outputs)
"""


@pytest.fixture
def random_pruning(monkeypatch):
    """The example's method, registered."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import add_a_method

    monkeypatch.setattr("hf_tokenreduce.methods.METHODS", METHODS)
    before = dict(METHODS), dict(METHOD_CLASSES)
    add_a_method.register()
    yield add_a_method
    for table, entries in zip((METHODS, METHOD_CLASSES), before, strict=True):
        table.clear()
        table.update(entries)


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_it_reduces_by_name_share_and_setting(random_pruning):
    stock = tiny_model(num_hidden_layers=12)
    model = reduce_tokens(stock, "random", share=0.6)
    counts = model(tiny_images()).token_counts
    assert (counts[:, -1] < counts[:, 0]).all()
    same = reduce_tokens(
        stock, {"method": "random", "keep_rate": model.config.reduction.keep_rate, "layers": (3, 6, 9)}
    )
    assert torch.equal(same(tiny_images()).logits, model(tiny_images()).logits)
    off = reduce_tokens(stock, random_pruning.RandomConfig(keep_rate=1.0))
    torch.testing.assert_close(off(tiny_images()).logits, stock(tiny_images()).logits, rtol=0, atol=1e-6)
    assert token_maps(model, tiny_images()).shares.max() <= 0.6
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(model, tiny_images(), 0.5)


def test_it_travels(random_pruning, tmp_path):
    model = reduce_tokens(tiny_model(), random_pruning.RandomConfig(keep_rate=0.5, layers=(1,)))
    folder = tmp_path / "random"
    save(model, folder)
    assert {"add_a_method.py", "extra_methods.py"} <= {file.name for file in folder.iterdir()}
    torch.save(tiny_images(), tmp_path / "images.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", FRESH, folder, tmp_path / "images.pt", tmp_path / "logits.pt"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, model(tiny_images()).logits.detach(), rtol=0, atol=1e-5)


def test_it_is_checked_and_has_a_card(random_pruning, tmp_path):
    folder = tmp_path / "random"
    save(reduce_tokens(tiny_model(), random_pruning.RandomConfig(keep_rate=0.5, layers=(1,))), folder)
    write_card(folder)
    assert "Random" in (folder / "README.md").read_text()
    report = check_folder(folder)
    assert not report.ok and any("add_a_method.py is not this version's" in error for error in report.errors)
    report = check_folder(folder, trust_remote_code=True)
    assert report.ok, report.errors


def test_a_comparison_has_a_line_for_it(random_pruning, tmp_path):
    save_stock = tiny_model(num_hidden_layers=12)
    save_stock.config.id2label = {index: str(index) for index in range(5)}
    save_stock.config.label2id = {str(index): index for index in range(5)}
    save(save_stock, tmp_path / "stock")
    for name in "01":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    command = ["compare", str(tmp_path / "stock"), str(tmp_path / "photos"), "-r", "random", "--share", "0.6"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--no-speed", "-o", str(tmp_path / "comparison"), "--debug"])
    assert stopped.value.code == 0
    rows = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert [row["method"] for row in rows] == [None, "random"]
    assert (tmp_path / "comparison" / "pareto.png").is_file()


@dataclass(frozen=True)
class OtherConfig(ReductionConfig):
    method: ClassVar[str | None] = "other"


class OtherReducer(Reducer):
    def after_attention(self, view, state):
        return state


def described(config_class, **values):
    return Method(config_class, "Other", "none", "Nothing.", **values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ToMeConfig, OtherReducer, described(ToMeConfig)), "There is a method 'tome' already"),
        (
            (dict, OtherReducer, described(OtherConfig)),
            "config_class must be a dataclass that extends",
        ),
        ((OtherConfig, dict, described(OtherConfig)), "reducer_class must extend Reducer"),
        ((OtherConfig, Reducer, described(OtherConfig)), "which Reducer does not override"),
        ((OtherConfig, OtherReducer, described(ToMeConfig)), "a Method that describes OtherConfig"),
        # This file imports pytest, which no published folder can.
        ((OtherConfig, OtherReducer, described(OtherConfig)), "test_register_method.py is saved with the model"),
    ],
)
def test_what_is_refused(arguments, message):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register_method(*arguments)
    assert before == METHODS


METHOD_FILE = """
from dataclasses import dataclass
from typing import ClassVar

from hf_tokenreduce.modeling.configuration_base import ReductionConfig
from hf_tokenreduce.modeling.hooks import Reducer
{imports}

@dataclass(frozen=True)
class PlainConfig(ReductionConfig):
    method: ClassVar[str | None] = "plain"
    {fields}


class PlainReducer(Reducer):
    def after_attention(self, view, state):
        {inside}
        return state
"""


def written(
    tmp_path, monkeypatch, name="a_plain_method", imports="", fields="seed: int = 0", inside="pass", helper=""
):
    """A module with a method, and a description of it."""
    text = METHOD_FILE.format(imports=imports, fields=fields, inside=inside) + f"\n\n{helper}\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    return module.PlainConfig, module.PlainReducer, Method(module.PlainConfig, "Plain", "none", "Nothing.")


@pytest.fixture
def tables():
    before = dict(METHODS), dict(METHOD_CLASSES)
    yield
    for table, entries in zip((METHODS, METHOD_CLASSES), before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inside": "from .helper import f"}, r"from \.helper import"),
        ({"imports": "import os, hf_tokenreduce"}, "import hf_tokenreduce"),
        ({"imports": "import hf_tokenreduce.modeling.tokens"}, "import hf_tokenreduce.modeling.tokens"),
        ({"name": "a-plain-method"}, "Name it like a variable"),
        ({"fields": "seed: int"}, "no default for seed"),
    ],
)
def test_a_file_that_cannot_travel_is_refused(tables, tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        register_method(*written(tmp_path, monkeypatch, **options))


def test_imports_anywhere_in_the_file_travel(tables, tmp_path, monkeypatch):
    text = '"""Written by from hf_tokenreduce import reduce_tokens."""'
    inside = "from hf_tokenreduce.modeling.tokens import apply_map; assert apply_map"
    register_method(*written(tmp_path, monkeypatch, imports=text, inside=inside))
    save(reduce_tokens(tiny_model(), "plain", seed=3), tmp_path / "saved")
    torch.save(tiny_images(), tmp_path / "inputs")
    arguments = [tmp_path / "saved", tmp_path / "inputs", tmp_path / "outputs"]
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_a_folder_brings_its_method_along_where_it_is_not_registered(tables, tmp_path, monkeypatch, capsys):
    """Only with trust, for it is code. The file may have other reducers too, such as one that the method extends."""
    helper = "class Helper(Reducer):\n    pass"
    register_method(*written(tmp_path, monkeypatch, helper=helper))
    model = reduce_tokens(tiny_model(), "plain", seed=3)
    save(model, tmp_path / "saved")
    METHODS.pop("plain"), METHOD_CLASSES.pop("plain")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "saved")])
    errors = capsys.readouterr().err
    assert "Unknown reduction method 'plain'" in errors and "give --trust-remote-code to the command" in errors
    assert "plain" not in METHODS
    loaded, _ = load_model(str(tmp_path / "saved"), trust_remote_code=True)
    assert torch.equal(loaded(tiny_images()).logits, model(tiny_images()).logits)
    assert loaded.config.reduction.to_dict() == {"method": "plain", "seed": 3}
    assert reduce_tokens(loaded, ToMeConfig(r=3)).config.reduction == ToMeConfig(r=3)
    save(loaded, tmp_path / "again")
    METHODS.pop("plain"), METHOD_CLASSES.pop("plain")
    trained = parse(
        ["--model_name_or_path", str(tmp_path / "again"), "--output_dir", "out", "--trust_remote_code", "True"]
    )
    assert training_model(trained[0], None)[0].config.reduction.to_dict() == {"method": "plain", "seed": 3}
    code = (tmp_path / "again" / "a_plain_method.py").read_text()
    assert code == (tmp_path / "saved" / "a_plain_method.py").read_text() and "from .hooks import Reducer" in code
    assert check_folder(tmp_path / "again", trust_remote_code=True).ok
    METHODS.pop("plain"), METHOD_CLASSES.pop("plain")
    for trust, code in (([], 2), (["--trust-remote-code"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(["card", str(tmp_path / "again"), *trust])
        assert stopped.value.code == code
    assert "token reduction by plain, made with" in (tmp_path / "again" / "README.md").read_text()


def test_a_method_that_is_not_described_here_still_shows(tables, tmp_path, monkeypatch):
    register_method(*written(tmp_path, monkeypatch))
    model = reduce_tokens(tiny_model(), "plain")
    METHODS.pop("plain")
    assert not token_maps(model, tiny_images()).gathers_the_rest()
    assert reduce_tokens(model, ToMeConfig(r=3)).config.reduction == ToMeConfig(r=3)


def test_an_upload_has_the_file(tables, tmp_path, monkeypatch):
    register_method(*written(tmp_path, monkeypatch))
    model, seen = reduce_tokens(tiny_model(), "plain"), []
    monkeypatch.setattr(
        PreTrainedModel, "_upload_modified_files", lambda self, folder, *args, **kw: seen.extend(os.listdir(folder))
    )
    hub = SimpleNamespace(create_repo=lambda *args, **kw: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *args: hub)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert "a_plain_method.py" in seen


def test_a_look_at_the_files_alone_runs_no_code(tables, tmp_path, monkeypatch):
    register_method(*written(tmp_path, monkeypatch))
    save(reduce_tokens(tiny_model(), "plain"), tmp_path / "saved")
    METHODS.pop("plain"), METHOD_CLASSES.pop("plain")
    file = tmp_path / "saved" / "a_plain_method.py"
    file.write_text(file.read_text() + f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    check_folder(tmp_path / "saved", load=False, trust_remote_code=True)
    check_folder(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()
    check_folder(tmp_path / "saved", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["{", "[1]", "null", '{"reduction": 7}', '{"reduction": {"method": ["plain"]}}', None]
)
def test_a_folder_without_a_method_is_left_to_the_loader(tmp_path, content):
    """What is wrong with it is told there, as a ValueError."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "extra_methods.py").write_text("from .a_plain_method import PlainConfig\n")
    before = dict(METHODS)
    register_from_folder(tmp_path)
    register_from_folder(tmp_path / "nowhere")
    assert before == METHODS
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(str(tmp_path / "nowhere"), trust_remote_code=True)


@pytest.mark.parametrize("title", ["ToMe (mine)", "Odd [", "A+B"])
def test_a_title_is_no_pattern(tables, tmp_path, monkeypatch, title):
    config, reducer, method = written(tmp_path, monkeypatch)
    register_method(config, reducer, replace(method, title=title))
    save(reduce_tokens(tiny_model(), "plain"), tmp_path / "saved")
    write_card(tmp_path / "saved")
    report = check_folder(tmp_path / "saved", load=False, trust_remote_code=True)
    assert not any("README.md tells of another model" in error for error in report.errors)
