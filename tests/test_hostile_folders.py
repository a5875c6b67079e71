"""Folders that are broken in every way: a command either succeeds or says in one line which file is at fault."""

import json
import shutil

import pytest
import torch
from helpers import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenreduce import LTMPConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce_cli import main


FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
NAMED = {
    "config": [
        ("null", "config.json"),
        ('{"hidden_size": 192', "config.json"),
        ("[1, 2]", "config.json"),
        ('"text"', "config.json"),
        ({"hidden_size": "192"}, "hidden_size"),
        ({"hidden_size": 0}, "config.json"),
        ({"hidden_size": 48.5}, "hidden_size"),
        ({"hidden_size": 24}, "shape"),
        ({"hidden_size": 60_000}, "shape"),  # of which there is no memory for
        ({"num_hidden_layers": 60_000}, "layers"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": 7}, "shape"),
        ({"hidden_act": "boom"}, "boom"),
        ({"id2label": 7}, "config.json"),
        ({"id2label": None}, "config.json"),
        ({"model_type": ["vit"]}, "config.json"),
        ({"model_type": None}, ""),
        ({"architectures": "x"}, "architectures must be a list"),
        ({"architectures": [7]}, "architectures must be a list"),
        ({"architectures": ["ResNetModel"]}, "is a ResNetModel"),
        ({"patch_size": 0}, "config.json"),
        ({"image_size": -32}, "give -8 x -8 patches"),
        ({"num_hidden_layers": "many"}, "config.json"),
        ({"qkv_bias": 3.5}, None),
        ({"dtype": False}, "config.json"),
        ({"reduction": {"method": "tome", "r": "many"}}, "ToMeConfig: r "),
        ({"reduction": 7}, "reduction must be"),
        ({"reduction": {"method": "none such"}}, "Unknown reduction method"),
    ],
    "preprocessor_config": [
        ("[]", "preprocessor_config.json"),
        ("null", "preprocessor_config.json"),
        ("{", "preprocessor_config.json"),
        ({"image_processor_type": 7}, "preprocessor_config.json"),
        ({"image_processor_type": "NoSuchProcessor"}, "preprocessor_config.json"),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile")
    for name, setting in (("stock", None), ("tome", ToMeConfig(r=4)), ("ltmp", LTMPConfig(merge_threshold=0.5))):
        model = tiny_model() if setting is None else reduce_tokens(tiny_model(), setting)
        model.config.id2label = {index: f"c{index}" for index in range(5)}
        model.config.label2id = {f"c{index}": index for index in range(5)}
        model.save_pretrained(place / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place / name)
    (place / "photos" / "c0").mkdir(parents=True)
    for number in range(2):
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / "photos" / "c0" / f"{number}.png")
    return place


def broken(folders, name, file, content):
    """A copy of a folder in which a file has this content, or these fields."""
    folder = folders / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / name, folder)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / file).read_text()), **content})
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def outcome(capsys, *arguments):
    """Exit code and message of a command; anything but success or one clear line fails."""
    try:
        main([*map(str, arguments)])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    errors = capsys.readouterr().err.strip()
    assert code in (0, 2), errors
    if code == 2:
        assert errors.startswith("tokenreduce: ") and "\n" not in errors, errors
        assert len(errors) < 700 and "Traceback" not in errors, errors
    return code, errors


@pytest.mark.parametrize("name", ["stock", "tome"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [(f"{file}.json", content, message) for file, cases in NAMED.items() for content, message in cases],
    ids=str,
)
def test_a_broken_file_is_named(folders, capsys, name, file, content, message):
    if name == "stock" and isinstance(content, dict) and "reduction" in content:
        message = "is not that of a reduced model"
    code, errors = outcome(capsys, "inspect", broken(folders, name, file, content))
    if message is not None:
        assert code == 2 and message in errors


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**16), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.sampled_from(["0", "a"]), st.integers(0, 3), max_size=2),
)  # fmt: skip
FIELDS = st.sampled_from(
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "image_size",
     "patch_size", "num_channels", "qkv_bias", "layer_norm_eps", "initializer_range", "hidden_dropout_prob", "dtype",
     "id2label", "label2id", "model_type", "architectures", "auto_map", "reduction", "pooler_act", "problem_type",
     "transformers_version", "attn_implementation", "return_dict", "output_hidden_states", "is_decoder"],
)  # fmt: skip


@given(name=st.sampled_from(["stock", "tome", "ltmp"]), fields=st.dictionaries(FIELDS, JUNK, min_size=1, max_size=2))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_configuration_gives_an_answer_or_a_reason(folders, capsys, name, fields):
    folder = broken(folders, name, "config.json", fields)
    outcome(capsys, "inspect", folder)


@given(
    name=st.sampled_from(["stock", "tome"]), file=st.sampled_from(FILES), cut=st.floats(0, 0.999), flip=st.booleans()
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_and_spoilt_files_give_an_answer_or_a_reason(folders, capsys, name, file, cut, flip):
    whole = (folders / name / file).read_bytes()
    place = int(cut * len(whole))
    content = whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :] if flip else whole[:place]
    folder = broken(folders, name, file, content)
    outcome(capsys, "evaluate", folder, folders / "photos", "--batch-size", 2)
