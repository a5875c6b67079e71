"""Folders that an older release saved are recognised by the SHA-256 of their code, not by what they say."""

import hashlib
import json
import shutil

import pytest
import torch
from helpers import saved, tiny_images
from test_hub import in_fresh_process
from test_security import configured, refused
from transformers import AutoConfig, AutoModelForImageClassification

import hf_tokenreduce
from hf_tokenreduce import restore
from hf_tokenreduce.hub import check_folder, code_files, released
from hf_tokenreduce.hub.code_files import CODE, MODELING, find_code, released_code, this_code


OLDER = "0.0.9"  # a made-up release: one file is others, one file was there that is no more


def code_of(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.py"))}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """What the older release saved."""
    folder = saved(tmp_path_factory.mktemp("older"), "vit", "evit")[1]
    (folder / "version.py").unlink()
    file = folder / "configuration_tokenreduce.py"
    file.write_text(file.read_text().replace("from .version import __version__\n", f'__version__ = "{OLDER}"\n'))
    file = folder / "layers.py"
    file.write_text(f"from .old_helper import NOTHING\n{file.read_text()}")
    (folder / "old_helper.py").write_text("NOTHING = 0\n")
    configured(folder, hf_tokenreduce_version=OLDER)
    return folder


@pytest.fixture
def folder(older, tmp_path):
    return shutil.copytree(older, tmp_path / "folder")


@pytest.fixture
def knowing(older, tmp_path, monkeypatch):
    """This version, which knows the older release."""
    (tmp_path / "released.json").write_text(json.dumps({"0.0.1": {"layers.py": "0"}, OLDER: code_of(older)}))
    monkeypatch.setattr(code_files, "RELEASED", tmp_path / "released.json")


def test_config_tells_the_version_that_saved_it(tmp_path):
    model, folder = saved(tmp_path)
    assert json.loads((folder / "config.json").read_text())["hf_tokenreduce_version"] == hf_tokenreduce.__version__
    configured(folder, hf_tokenreduce_version="0.0.1")
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert loaded.config.hf_tokenreduce_version == "0.0.1"
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").hf_tokenreduce_version == hf_tokenreduce.__version__
    restore(loaded).save_pretrained(tmp_path / "dense")
    assert "hf_tokenreduce_version" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert check_folder(tmp_path / "published", load=False).code_version == hf_tokenreduce.__version__
    assert torch.equal(loaded.eval()(tiny_images()).logits, model(tiny_images()).logits)


def test_code_of_an_older_release_is_accepted_and_told(folder, knowing):
    report = check_folder(folder)
    assert report.ok, report.errors
    assert report.code_version == OLDER and report.max_difference <= 1e-5
    assert "old_helper.py" in report.files
    assert report.warnings[0].startswith(f"The code is that of hf_tokenreduce {OLDER}, as it was released; this is")
    configured(folder, hf_tokenreduce_version="7.1")
    assert "'7.1' saved it, but the code is that of 0.0.9" in check_folder(folder, load=False).warnings[1]


def test_code_of_an_older_release_tells_its_own_version_when_it_saves(older, tmp_path):
    script = """
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(work + "/again")
print(json.load(open(work + "/again/config.json"))["hf_tokenreduce_version"])
"""
    assert in_fresh_process(script, older, tmp_path).strip() == OLDER


def test_a_claim_of_an_older_version_is_not_believed(folder):
    """The package does not know that release."""
    found = refused(folder, "layers.py is not this version's", "old_helper.py", "pass trust_remote_code=True")
    assert found.code_version is None
    assert "says that hf_tokenreduce '0.0.9' saved the folder" in " ".join(found.warnings)
    assert "proves nothing about the code" in " ".join(found.warnings)


@pytest.mark.parametrize("claimed", [OLDER, hf_tokenreduce.__version__, "0.0.1", ["x"], {"a": 1}, "x" * 10**5])
@pytest.mark.parametrize("file", ["layers.py", "old_helper.py"])
def test_a_changed_file_of_an_older_release_is_refused(folder, knowing, tmp_path, file, claimed):
    (folder / file).write_text(f"{(folder / file).read_text()}\nimport os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    configured(folder, hf_tokenreduce_version=claimed)
    report = refused(folder, "layers.py is not this version's")
    assert report.code_version is None and sum(map(len, report.warnings)) < 1000
    assert not (tmp_path / "ran").exists()


def test_code_of_two_releases_is_refused(folder, knowing):
    shutil.copy(MODELING / "layers.py", folder)
    report = refused(folder, "configuration_tokenreduce.py is not this version's")
    assert report.code_version is None


def test_a_file_that_the_older_release_did_not_have_is_refused(folder, knowing):
    shutil.copy(MODELING / "version.py", folder)
    assert refused(folder, "layers.py is not this version's").code_version is None


def test_a_method_of_others_stays_foreign(folder, knowing):
    (folder / "extra_methods.py").write_text("from .mine import A\nEXTRA_METHODS = ()\n")
    (folder / "mine.py").write_text("A = 1\n")
    code = find_code(folder)
    assert (code.version, code.foreign) == (OLDER, ["extra_methods.py", "mine.py"])
    refused(folder, "extra_methods.py is not this version's", "mine.py is not this version's")
    (folder / "extra_methods.py").write_text("import os\n")  # a table without a method is changed code
    assert find_code(folder).version is None


def test_links_out_of_the_folder_are_not_read(folder, knowing, tmp_path):
    (folder / "layers.py").rename(tmp_path / "elsewhere.py")
    (folder / "layers.py").symlink_to(tmp_path / "elsewhere.py")
    assert refused(folder, "layers.py is a link out of the folder").code_version is None


def test_the_record_of_releases(tmp_path, monkeypatch, capsys):
    assert all(
        "modeling_tokenreduce.py" in files and all(len(value) == 64 for value in files.values())
        for files in released_code().values()
    )
    file = tmp_path / "released.json"
    file.write_text("{}\n")
    monkeypatch.setattr(code_files, "RELEASED", file)
    with pytest.raises(SystemExit, match="is not recorded"):
        released.main(["--check"])
    released.main([])
    assert released_code() == {hf_tokenreduce.__version__: this_code()} and set(this_code()) == CODE
    released.main([])
    released.main(["--check"])
    assert "files of" in capsys.readouterr().out
    file.write_text(json.dumps({hf_tokenreduce.__version__: {"layers.py": "0"}, "9.0": {}}))
    with pytest.raises(SystemExit, match="is recorded with other code"):
        released.main([])
    assert released_code()[hf_tokenreduce.__version__] == {"layers.py": "0"}
    released.main(["--replace"])
    assert list(released_code().items()) == [(hf_tokenreduce.__version__, this_code()), ("9.0", {})]
