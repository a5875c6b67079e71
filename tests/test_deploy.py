"""Exported graphs compute what the models compute, on any number of images, in the runtime that serves them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, family_model
from helpers import ADAPTIVE, BASES, METHODS, NEWER, reduce_tiny, slow, tiny_images, tiny_model
from PIL import Image
from transformers import ASTFeatureExtractor, AutoConfig, AutoImageProcessor, ViTImageProcessor

from hf_tokenreduce import ATSConfig, DLViTConfig, EViTConfig, ToMeConfig, export, load_exported, reduce_tokens
from hf_tokenreduce.deploy import exporting
from hf_tokenreduce.evaluation.resume import Processes
from hf_tokenreduce.files import model_folder
from hf_tokenreduce.loading import load_pictures
from hf_tokenreduce.modeling import tome
from hf_tokenreduce.predict import find_images, predict
from hf_tokenreduce.tasks import main_output
from hf_tokenreduce_cli import main


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


SLOW = [("onnx", "evit"), ("onnx", "topk"), ("onnx", "dlvit"), ("onnx", None), ("openvino", "ats"), ("torch", "ltmp")]
SLOW += [(format, name) for name in NEWER for format in ("onnx", "openvino")]


@pytest.mark.parametrize(
    ("format", "method"),
    [
        *[("onnx", name) for name in ("tome", "sit", "dlvit-share", "ats")],
        *[("openvino", "bat"), ("openvino", "ltmp"), ("torch", "tome")],
        *[slow(*case) for case in SLOW],
    ],
)
def test_a_graph_computes_what_the_model_computes(tmp_path, format, method):
    stock = tiny_model()
    model = stock if method is None else reduce_tiny(stock, METHODS[method][0])
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    found = export(model, tmp_path / "graph", image_processor=processor, format=format)
    one_by_one = method in ADAPTIVE
    assert found["largest_difference"] < 1e-5 and found["output"] == "logits"
    assert (found["batch_size"], found["batch_sizes"]) == ((1, [1]) if one_by_one else (None, [1, 2, 5]))
    assert json.loads((tmp_path / "graph" / "export.json").read_text()) == found
    loaded = load_exported(tmp_path / "graph", threads=1, batch_size=3, trust_remote_code=format == "torch")
    flat = torch.full((1, 3, 32, 32), 0.3)  # where all patches are alike, ties decide
    for images in (tiny_images(1), tiny_images(7, seed=9), flat):
        with torch.no_grad():
            expected = model(images, output_patch_map=True) if method else model(images)
        logits, tokens = loaded.with_counts(images)
        torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=0)
        # In the last layer a method that decides for each image has nothing to do: nobody reads its patches.
        at = -2 if one_by_one else -1
        assert tokens.tolist() == (expected.token_counts[:, at].tolist() if method else [65] * len(images))
    config = AutoConfig.from_pretrained(tmp_path / "graph")
    assert config.model_type == "vit" and config.num_labels == 5 and config.architectures == [type(stock).__name__]
    assert AutoImageProcessor.from_pretrained(tmp_path / "graph").size["height"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "ltmp"])
def test_compiled_by_torch(tmp_path, method):
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    assert export(model, tmp_path / "graph", format="aoti")["largest_difference"] < 1e-5
    images = tiny_images(3)
    with torch.no_grad():
        loaded = load_exported(tmp_path / "graph", trust_remote_code=True)
        for given in (images, images.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(loaded(given), model(images).logits, atol=2e-5, rtol=0)


def test_a_graph_of_a_fixed_number_of_images_takes_any(tmp_path):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    assert export(model, tmp_path / "graph", batch_size=3)["batch_sizes"] == [3]
    loaded = load_exported(tmp_path / "graph")
    for count in (1, 3, 4):
        images = tiny_images(count)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images).logits, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(any number, 3, 32, 32\), got \[1, 3, 16, 16\]"):
        loaded(torch.zeros(1, 3, 16, 16))
    with pytest.raises(
        ValueError, match=r"ATS keeps a different number of tokens .* Leave out batch_size=3, or give 1"
    ):
        export(reduce_tokens(model, ATSConfig(layers=(1,))), tmp_path / "a", batch_size=3)


def quantised(folder):
    """The kinds of what feeds each product of a graph: by its name, whether both sides are of 8 bits."""
    openvino = pytest.importorskip("openvino")
    found = {}
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_type_name() == "MatMul":
            feeds = [place.get_source_output().get_node().get_type_name() for place in node.inputs()]
            found[node.get_friendly_name()] = feeds[0] == "FakeQuantize"
    return found


@pytest.mark.parametrize("method", ["tome", slow("dlvit-share")])
def test_8_bits_are_for_layers_with_weights(tmp_path, monkeypatch, method):
    pytest.importorskip("nncf")
    model = reduce_tiny(tiny_model(), METHODS[method][0])
    images = tiny_images(12)
    told = []  # to the makers of OpenVINO, of what users do
    sender = pytest.importorskip("openvino_telemetry.utils.sender").TelemetrySender
    monkeypatch.setattr(sender, "send", lambda *message: told.append(message))
    found = export(model, tmp_path / "graph", format="openvino", int8=True, images=images)
    assert not told
    assert found["int8"] and found["images"] == 12 and "largest_difference" not in found
    products = quantised(tmp_path / "graph")
    scores = [name for name in products if name.startswith("reducer.")]
    assert len(scores) == (2 if method == "dlvit-share" else 0) and not any(products[name] for name in scores)
    # Queries, keys, values, projection and MLP of each layer but what is left out of the last, and the classifier.
    assert sum(products.values()) == 4 * 6 + 1
    logits = load_exported(tmp_path / "graph", batch_size=4)(images)
    with torch.no_grad():
        expected = model(images).logits
    assert (logits - expected).abs().max() < 0.2 * expected.abs().max()
    same = (logits.argmax(1) == expected.argmax(1)).double().mean().item()
    assert found["same_class"] == pytest.approx(same, abs=0.1)  # 8 bits of another number of images round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family, reduced):
    model = family_model(family)
    model = reduce_tokens(model, EViTConfig(keep_rate=0.6, layers=(1,))) if reduced else model
    if "backbone" in family or family.startswith("llava") or (family == "mae" and not reduced):
        with pytest.raises(ValueError, match=f"A {type(model).__name__} cannot be exported: "):
            export(model, tmp_path / "graph")
        return
    assert export(model, tmp_path / "graph")["largest_difference"] < 1e-5


def test_features_of_an_encoder_and_a_half_type(tmp_path):
    model = reduce_tokens(tiny_model("vit", BASES, num_hidden_layers=2), ToMeConfig(r=7)).to(torch.bfloat16)
    found = export(model, tmp_path / "graph")
    assert model.dtype == torch.bfloat16 and found["output"] == "features"
    images = tiny_images(3)
    with torch.no_grad():
        expected = main_output(model.float()(images)).numpy()
    np.testing.assert_allclose(load_exported(tmp_path / "graph")(images), expected, atol=2e-5)


@pytest.fixture
def a_model(tmp_path, monkeypatch):
    """A folder with a model, and one with photographs, in the working directory."""
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    model.config.id2label = dict(enumerate(["cat", "dog", "owl", "hen", "fox"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for name in ("photo.jpg", "photos/a.png", "photos/inner/b.jpg", "photos/c.png"):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(name)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")

    def label(file):
        with torch.no_grad():
            logits = model(processor(load_pictures([file], 1)[0], return_tensors="pt").pixel_values).logits
        return model.config.id2label[logits.argmax().item()]

    return label


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


@pytest.mark.parametrize(("format", "size"), [("onnx", "dynamic"), ("openvino", "2"), ("torch", "dynamic")])
def test_the_readme_runs(a_model, capsys, monkeypatch, format, size):
    Path("more").mkdir()
    Path("more/photo.jpg").write_bytes(Path("photo.jpg").read_bytes())
    options = ("--format", format, "--batch-size", size, "--images", "more", "--json")
    assert run("export", "model", "-o", "graph", *options) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] < 1e-5
    if format == "torch":
        with pytest.raises(ValueError, match="may run code when it is loaded"):
            load_exported("graph")
        assert run("predict", "graph", "photo.jpg") == 2
    Path("graph").rename("elsewhere")
    Path("photo.jpg").rename("elsewhere/photo.jpg")
    monkeypatch.chdir("elsewhere")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.strip() == a_model("photo.jpg")
    # No paths of this machine are in what others get.
    assert not any(b"/hf_tokenreduce/" in file.read_bytes() for file in Path().iterdir())


def test_predict_labels_images_by_any_model(a_model, capsys):
    assert run("export", "model", "-o", "graph") == 0
    capsys.readouterr()
    answers = {}
    for model in ("model", "graph"):
        assert run("predict", model, "photos", "photo.jpg", "--batch-size", "2", "--json") == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert sorted(row["file"] for row in rows) == sorted(
            ["photos/a.png", "photos/broken.jpg", "photos/c.png", "photos/inner/b.jpg", "photo.jpg"]
        )
        answers[model] = {row["file"]: row for row in rows}
        broken = answers[model].pop("photos/broken.jpg")
        assert set(broken) == {"file", "error"} and "cannot be read as an image" in broken["error"]
        for file, row in answers[model].items():
            assert row["label"] == a_model(file) and row["tokens"] == 51 and 0.2 < row["score"] < 1
    assert {file: row["score"] for file, row in answers["graph"].items()} == pytest.approx(
        {file: row["score"] for file, row in answers["model"].items()}, abs=1e-5
    )


@pytest.mark.slow
def test_processes_that_are_launched_share_the_images(a_model):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_tokenreduce_cli"]
    done = subprocess.run(
        [*command, "predict", "model", "photos", "-o", "out"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    parts = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(Path("out").glob("part-*"))
    ]
    assert [len(rows) for rows in parts] == [2, 2]
    for row in parts[0] + parts[1]:
        assert "error" in row if row["file"] == "photos/broken.jpg" else row["label"] == a_model(row["file"])
    assert len({row["file"] for row in parts[0] + parts[1]}) == 4


def test_an_image_on_which_the_model_fails_takes_no_other_with_it(a_model, monkeypatch):
    model = reduce_tokens(tiny_model(), ToMeConfig(r=7))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    Path("photos/broken.jpg").unlink()
    expected = {row["file"]: row for row in predict(model, ["photos"], processor, progress=False)}
    worst = next(iter(expected))
    first = processor(load_pictures([worst], 1)[0], return_tensors="pt").pixel_values

    def fails_on_one(module, given):
        if any(torch.equal(one[None], first) for one in given[0]):
            raise RuntimeError("nothing is left\nof it")

    model.register_forward_pre_hook(fails_on_one)
    found = {row["file"]: row for row in predict(model, ["photos"], processor, progress=False)}
    assert found.pop(worst) == {"file": worst, "error": "the model failed: nothing is left"}
    assert {file: row["label"] for file, row in found.items()} == {
        file: row["label"] for file, row in expected.items() if file != worst
    }
    Path("photos/loop").symlink_to(".")
    shutil.copytree("photos/inner", "photos/.thumbnails")
    assert len(find_images(["photos"])) == 3
    Path("again.png").write_bytes(Path(worst).read_bytes())
    with pytest.raises(ValueError, match="The model fails on every image"):
        list(predict(model, [worst, "again.png"], processor, progress=False))


def test_predict_goes_on_where_it_stopped(a_model, capsys, monkeypatch):
    assert run("export", "model", "-o", "graph") == 0
    loaded = load_exported("graph")
    rows = predict(loaded, ["photos"], batch_size=1, top_k=2, output_dir="out", progress=False)
    first = next(rows)
    assert first["label"] != first["others"][0]["label"] and len(first["others"]) == 1
    rows.close()  # as a process that is killed
    with Path("out/part-0.jsonl").open("a") as lines:
        lines.write('{"file": "photos/c.p')
    monkeypatch.setattr("hf_tokenreduce.predict.launched_processes", lambda device: Processes(0, 2))
    mine = [row["file"] for row in predict(loaded, ["photos"], top_k=2, output_dir="out", progress=False)]
    assert len(mine) == 2 and first["file"] not in mine  # half of the three that are left, rounded up
    monkeypatch.setattr("hf_tokenreduce.predict.launched_processes", lambda device: Processes())
    (last,) = predict(loaded, ["photos"], top_k=2, output_dir="out", progress=False)
    assert len({first["file"], *mine, last["file"]}) == 4
    assert not list(predict(loaded, ["photos"], top_k=2, output_dir="out", progress=False))
    with pytest.raises(ValueError, match="top_k was 2, now 1"):
        predict(loaded, ["photos"], output_dir="out")
    assert run("predict", "graph", "nowhere") == 2
    assert "nowhere is neither an image nor a folder of images" in capsys.readouterr().err
    assert run("inspect", "graph") == 2
    assert "'graph' is an exported model" in capsys.readouterr().err


def test_the_readme_of_sounds_runs(tmp_path, capsys, monkeypatch):
    model = reduce_tokens(family_model("ast"), ToMeConfig(r=7))
    processor = ASTFeatureExtractor(num_mel_bins=64, max_length=64)
    export(model, tmp_path / "graph", image_processor=processor, format="openvino")
    monkeypatch.chdir(tmp_path / "graph")
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], {})
    heard = processor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt").input_values
    assert capsys.readouterr().out.strip() == model.config.id2label[model(heard).logits.argmax().item()]


@pytest.mark.parametrize("format", ["onnx", *map(slow, ("openvino", "torch"))])
def test_the_readme_runs_without_a_processor(tmp_path, capsys, monkeypatch, format):
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    export(model, tmp_path / "graph", format=format)
    monkeypatch.chdir(tmp_path / "graph")
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], {})
    best = model(torch.zeros(1, 3, 32, 32)).logits.argmax().item()
    assert capsys.readouterr().out.strip() == model.config.id2label[best]


def test_no_graph_of_another_model_stays(tmp_path):
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    with model_folder(tmp_path) as place:
        graphs = ("model.onnx", "model.onnx.data", "openvino_model.xml", "openvino_model.bin", "model.pt2")
        for name in ("config.json", *graphs):
            (place / name).write_text("{}")
    export(model, tmp_path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "export.json",
        "model.onnx",
    ]


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    with pytest.raises(ValueError, match=r"no format 'tflite'. .*onnx, openvino, torch, aoti"):
        export(model, tmp_path / "a", format="tflite")
    for changes, what in (
        ({"int8": True}, "8 bits work only in OpenVINO, but the format is onnx"),
        ({"int8": True, "format": "openvino"}, "8 bits are fitted to images. Give images="),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=what):
            export(model, tmp_path / "a", **changes)
    with monkeypatch.context() as patched:
        patched.setattr("hf_tokenreduce.deploy.graphs._translations", dict)
        with pytest.raises(ValueError, match=r"cannot be written as ONNX.*: ONNX has no aten\.sort\.stable"):
            export(model, tmp_path / "a")
        match = tome.match_most_similar
        patched.setattr(
            tome, "match_most_similar", lambda keys, *others: keys.sum().item() < 9e9 and match(keys, *others)
        )
        with pytest.raises(ValueError, match=r"torch\.export cannot follow the model .Could not guard"):
            export(model, tmp_path / "a", format="torch")
    with pytest.raises(ValueError, match=r"has no export\.json, so it is not an exported model"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="Linear cannot be exported"):
        export(torch.nn.Linear(2, 2), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        export(model, tmp_path / "full")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'hf-tokenreduce\[onnx\]'"):
        export(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Jumps(torch.nn.Module):
    """A model whose output jumps where its input is 1, as one does that keeps the higher of two scores."""

    reduces = True

    def main(self, inputs):
        mean = inputs.flatten(1).double().mean(dim=1, keepdim=True)
        return torch.cat([mean, torch.where(mean > 1, 1.0, -1.0)], dim=1).float()


def test_an_image_in_which_rounding_decides_does_not_count(monkeypatch, tmp_path):
    model, images = Jumps(), torch.tensor([1.0, 0.3, 2.0, 0.5]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()

    def compared(changes, batch_size=None, which=slice(None)):
        """changes: what is added to the second output of the graph, for each value of the pixels"""

        def run(inputs):
            found = model.main(inputs)
            for row, value in enumerate(inputs[:, 0, 0, 0].tolist()):
                found[row, 1] += changes.get(round(value, 3), 0.0)
            return [found]

        monkeypatch.setattr(exporting, "FORMATS", {"onnx": SimpleNamespace(open=lambda *arguments: run)})
        return exporting._compare(model, images[which], "onnx", tmp_path, batch_size)

    other_side = {1.0: 2.0}  # where the model jumps from -1 to 1
    for batch_size, sizes in ((None, [1, 2, 4]), (1, [1]), (4, [4])):
        assert compared({}, batch_size) == {"batch_sizes": sizes, "largest_difference": 0, "decided_by_rounding": 0}
        assert compared(other_side, batch_size) == {
            "batch_sizes": sizes, "largest_difference": 0, "decided_by_rounding": 1,
        }  # fmt: skip
        for wrong in (
            {1.0: 0.5},
            {2.0: -2.0},
            {0.3: 1.0},
        ):  # no image that is nearly the same gives it
            with pytest.raises(ValueError, match="exported graph differs from the model by"):
                compared(other_side | wrong, batch_size)
    with pytest.raises(ValueError, match="In all 1 images rounding decides which tokens stay"):
        compared(other_side, 1, slice(1))
    monkeypatch.setattr(Jumps, "reduces", False)
    with pytest.raises(ValueError, match="exported graph differs from the model by"):  # it removes no tokens
        compared(other_side)


def test_numbers_that_are_not_finite_are_no_agreement(tmp_path):
    model = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7))
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="differs from the model by nan"):
        export(model, tmp_path / "graph")
    with pytest.raises(ValueError, match="DL-ViT cannot be exported yet: its filter is not trained"):
        export(reduce_tokens(tiny_model(num_hidden_layers=2), DLViTConfig(keep_rate=0.5)), tmp_path / "graph")


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tokenreduce.deploy.exporting.TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="Nothing was written"):
        export(reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7)), tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.slow
def test_a_signal_after_graphs_of_openvino_are_dropped(tmp_path):
    """OpenVINO leaves a freed signal stack in place where two Cores are dropped in the order they were made in."""
    pytest.importorskip("nncf")
    code = """
import gc, os, signal, sys
from helpers import tiny_images, tiny_model
from hf_tokenreduce import ToMeConfig, export, load_exported, reduce_tokens
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
model, images = reduce_tokens(tiny_model(num_hidden_layers=2), ToMeConfig(r=7)), tiny_images(12)
export(model, "graph", format="openvino", int8=True, images=images)
first, second = load_exported("graph"), load_exported("graph")
first(images), second(images)
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""
    places = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1))}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | places, capture_output=True, text=True
    )
    assert ran.stdout.split()[-2:] == ["handled", "alive"], (ran.returncode, ran.stderr[-2000:])
