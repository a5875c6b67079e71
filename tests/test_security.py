"""Folders that are broken or mean harm are refused, in one line and before anything of theirs is run or allocated."""

import json
import os
import pickle
import time

import pytest
import torch
from helpers import saved
from safetensors.torch import load_file, save_file

from hf_tokenreduce.hub import check_folder


def configured(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, *words):
    begin = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_tokenreduce.hub.check._compare", lambda *_: pytest.fail("it was loaded"))
        report = check_folder(folder)
    assert time.perf_counter() - begin < 10
    assert not report.ok
    assert report.max_difference is None
    message = " ".join(report.errors)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 1500
    with pytest.raises(ValueError, match="cannot be published"):
        report.raise_for_errors()
    return report


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_that_computes_something_else_is_found(folder):
    """It loads, but the logits give it away; and the warning names the file."""
    file = folder / "layers.py"
    file.write_text(file.read_text().replace("return self.o_proj(", "return 1.01 * self.o_proj("))
    report = check_folder(folder, trust_remote_code=True)
    assert "computes something else" in report.errors[0]
    assert report.warnings[0].startswith("layers.py is not this version's")


def test_changed_code_is_not_run_unless_trusted(folder, tmp_path):
    file = folder / "layers.py"
    file.write_text(f"{file.read_text()}\nimport os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    refused(folder, "layers.py is not this version's", "pass trust_remote_code=True")
    assert not (tmp_path / "ran").exists()
    assert check_folder(folder, trust_remote_code=True).ok and (tmp_path / "ran").exists()


def test_code_that_does_not_load_is_found_and_gets_no_credentials(folder, monkeypatch):
    for name in ("HF_TOKEN", "MY_SECRET_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    file = folder / "layers.py"
    found = """raise RuntimeError(f'{[name for name in os.environ if os.environ[name] == "hf_secret"]} hold it')"""
    file.write_text(f"{file.read_text()}\nimport os\n{found}\n")
    report = check_folder(folder, trust_remote_code=True)
    assert "does not load in a fresh process: RuntimeError: [] hold it" in report.errors[0]


@pytest.mark.parametrize("alone", [False, True])
def test_a_planted_pickle_is_never_opened(folder, tmp_path, alone):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if alone:
        (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin may hold pickled objects", *(["model.safetensors is missing"] if alone else []))
    if not alone:  # all the rest is what save_pretrained wrote, and may be published
        report = check_folder(folder, skip_others=True)
        assert report.ok, report.errors
        assert report.max_difference <= 1e-5
        assert report.files == {
            name: (folder / name).stat().st_size for name in os.listdir(folder) if name[-4:] != ".bin"
        }
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists()  # it was a bomb


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "arguments.bin",
        "scheduler.PKL",
        "events.out.tfevents.1",
        "notes.txt",
        "evil.py",
        "__init__.py",
        "adapter_config.json",
        "model.safetensors.bak",
        "images/photo.jpg",
        "images/..png.exe",
        "model-1-of-2.safetensors",
    ],
)
def test_what_does_not_belong(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    report = refused(folder, name)
    assert name not in report.files


def test_folders_that_do_not_belong(folder):
    for name in ("checkpoint-12", "runs", ".git", "__pycache__", ".cache"):
        (folder / name).mkdir()
    (folder / "weights").mkdir()
    report = refused(folder, "weights/ does not belong")
    assert len(report.errors) == 1
    left = [warning for warning in report.warnings if warning.startswith("Left out, as training leaves it: ")]
    assert [warning.split()[-1] for warning in left] == ["checkpoint-12/", "runs/"]


def test_many_files_make_no_endless_message(folder):
    for number in range(500):
        (folder / f"{number:03}.txt").touch()
    assert refused(folder).errors[-1] == "And 490 more."


@pytest.mark.parametrize("name", ["README.md", "images", "configuration_tokenreduce.py", "model.safetensors"])
def test_links_out_of_the_folder(folder, tmp_path, name):
    secret = tmp_path / "secret"
    if name == "images":
        secret.mkdir()
        (secret / "photo.png").write_bytes(b"private")
    else:
        secret.write_text("private")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert name not in refused(folder, f"{name} is a link out of the folder").files


@pytest.mark.parametrize("target", ["/dev/zero", "elsewhere.json"])
def test_a_configuration_that_is_elsewhere(folder, tmp_path, target):
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / target)
    assert "config.json" not in refused(folder, "config.json is a link out of the folder").files


def test_links_within_the_folder_and_to_nothing(folder):
    (folder / "LICENSE").symlink_to(folder / "README.md")
    refused(folder, "LICENSE is no readable file")
    (folder / "README.md").write_text("# A card\n")
    assert check_folder(folder, load=False).ok


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, "model.safetensors", "is no whole safetensors file", "cut short")


def test_a_header_that_promises_too_much(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "is no whole safetensors file")
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    refused(folder, "is no whole safetensors file")


def test_weights_of_another_model(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "vit.layers.1.mlp.fc1.weight"
    for changed, words in (
        ({key: value for key, value in tensors.items() if key != name}, (f"lacks 1: '{name}'",)),
        ({**tensors, "extra": tensors[name].clone()}, ("has besides 1: 'extra'",)),
        ({**tensors, name: tensors[name][:-1]}, (name, "(95, 48)", "(96, 48)")),
    ):
        save_file({key: value.contiguous() for key, value in changed.items()}, folder / "model.safetensors")
        refused(folder, *words)


def test_weights_in_parts(tmp_path):
    model = saved(tmp_path)[0]
    folder = tmp_path / "published"
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    report = check_folder(folder, load=False)
    assert report.ok, report.errors
    assert {part.name for part in parts} < report.files.keys()
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    refused(folder, parts[0].name, "is no whole safetensors file")
    parts[0].unlink()
    refused(folder, f"points to '{parts[0].name}', which is no weight file of this folder")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "model.safetensors.index.json is missing")


@pytest.mark.parametrize("target", ["../../secret.safetensors", "/etc/passwd", "pytorch_model.bin", None])
def test_an_index_that_points_elsewhere(folder, target):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    refused(folder, "which is no weight file of this folder")


@pytest.mark.parametrize(
    "reference",
    [
        "other/repo--modeling_tokenreduce.TokenReduceViTForImageClassification",
        "../modeling_tokenreduce.TokenReduceViTForImageClassification",
        "/tmp/evil.Class",
        "a.b.Class",
        "modeling_tokenreduce",
        "evil.TokenReduceViTForImageClassification",
        "modeling_tokenreduce.TokenReduceDeiTForImageClassification",
        ["modeling_tokenreduce.TokenReduceViTForImageClassification", None],
        None,
    ],
)
@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForImageClassification", "AutoTokenizer"])
def test_an_auto_map_that_points_elsewhere(folder, auto_class, reference):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    configured(folder, auto_map={**auto_map, auto_class: reference})
    refused(folder, f"auto_map sends '{auto_class}' to")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"auto_map": None}, "auto_map None"),
        ({"auto_map": {}}, "auto_map {}"),
        ({"model_type": "vit"}, "model_type 'vit'"),
        ({"model_type": ["tokenreduce_vit"]}, "model_type"),
        ({"architectures": ["Evil"]}, "architectures ['Evil']"),
        ({"architectures": "TokenReduceViTForImageClassification"}, "architectures"),
        ({"hidden_size": "48"}, "hidden_size must be an integer"),
        ({"num_labels": 30_000_000, "id2label": None}, "num_labels must be an integer from 1"),
        ({"hidden_size": 10**12}, "hidden_size must be an integer from 1 to"),
        ({"hidden_size": 51}, "(1, 1, 51) by config.json"),
        ({"num_attention_heads": 5}, "hidden_size=48 is no multiple of num_attention_heads=5"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "has besides"),
        ({"num_hidden_layers": 100}, "lacks"),
        ({"intermediate_size": 1e400}, "intermediate_size"),
        ({"image_size": [32]}, "image_size"),
        ({"image_size": [16000, 16000], "patch_size": 1}, "16000 x 16000 patches"),
        ({"patch_size": 64}, "0 x 0 patches"),
        ({"patch_size": 0}, "patch_size"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"hidden_act": "evil"}, "evil"),
        ({"id2label": [1, 2]}, "id2label"),
        ({"reduction": [1]}, "reduction must be an object"),
        ({"reduction": {"method": "evil"}}, "Unknown reduction method 'evil'"),
        ({"reduction": {"method": "evit", "keep_rate": "0.5"}}, "keep_rate"),
        ({"reduction": {"method": "evit", "layers": list(range(10**6))}}, "layers a list of 1,000,000 entries"),
        ({"reduction": {"method": "tome", "r": [1] * 10**6}}, "r a list of 1,000,000 entries"),
        ({"reduction": {"method": "x" * 10**6}}, "method"),
        ({"reduction": {"method": "tome", "r": 7, "evil": 1}}, "Unknown field ['evil']"),
        ({"reduction": {"method": "ats", "layers": [1], "num_tokens": 10**12}}, "num_tokens 1000000000000"),
        ({"reduction": {"method": "dlvit", "hidden_size": 10**5}}, "hidden_size 100000"),
        ({"custom_pipelines": {"image-classification": {"impl": "evil.Pipe"}}}, "custom_pipelines"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel'"),
        ({"_attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_that_are_refused(folder, values, words):
    configured(folder, **values)
    refused(folder, words)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 10**6, "is not valid JSON"),
        (b"[1]", "must hold an object"),
        (None, "is missing"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "missing"],
)
def test_files_that_are_no_json(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    refused(folder, name, words)


def test_a_processor_with_code(folder):
    path = folder / "preprocessor_config.json"
    values = {**json.loads(path.read_text()), "auto_map": {"AutoImageProcessor": "other/repo--evil.Processor"}}
    path.write_text(json.dumps(values))
    refused(folder, "processor with code of its own")


def test_a_processor_of_huge_images(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 15000, "width": 15000}}))
    refused(folder, "size must have sides from 1 to 4,096 pixels")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_answers_that_are_not_finite(folder):
    """On either side: the largest of 0 and NaN is 0 in Python, so nothing would differ."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 1e308}))
    assert "What pipeline answers is not finite here" in check_folder(folder).errors[0]


def test_outputs_that_are_not_finite_in_a_fresh_process(folder):
    file = folder / "layers.py"
    file.write_text(file.read_text().replace("return self.o_proj(", "return float('nan') * self.o_proj("))
    report = check_folder(folder, trust_remote_code=True)
    assert "The output of this model is not finite in a fresh process" in report.errors[0]


def test_broken_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in check_folder(folder).errors[0]


def test_a_processor_of_another_model(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 48, "width": 48}}))
    assert "The images are 48x48, the model takes 32x32" in check_folder(folder).errors[0]


def test_images_must_be_images(folder):
    with pytest.raises(ValueError, match=r"images must be pixel values .* got \(3, 32, 32\)"):
        check_folder(folder, images=torch.randn(3, 32, 32))


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        check_folder(tmp_path / "nothing")


def test_weights_in_one_file_and_in_parts(tmp_path):
    """transformers loads the one file, and deletes neither when it writes the other."""
    model = saved(tmp_path)[0]
    folder = tmp_path / "published"
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors").is_file()
    refused(folder, "has weights in one file and in parts", "model.safetensors.index.json")
    for part in folder.glob("model-*.safetensors"):
        part.unlink()
    refused(folder, "Delete model.safetensors.index.json")
