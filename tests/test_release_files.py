"""The files around the package agree with each other."""

import re
from pathlib import Path

import yaml

import hf_tokenreduce
from hf_tokenreduce.hub.usage import LEAST_TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_continuous_integration_calls_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands += [row["command"] for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]]
    made = [word for command in commands if command.startswith("make ") for word in command.split()[1:]]
    called = {word for word in made if "=" not in word}
    assert {"check", "test", "test-oldest", "test-plain", "test-main", "release-check"} <= called <= targets
    assert set(read(".ci/run").rsplit("make ", 1)[1].split()) <= targets


def test_oldest_versions_are_those_of_pyproject():
    project, oldest, makefile = read("pyproject.toml"), read("constraints-oldest.txt"), read("Makefile")
    bounds = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', bounds):
        assert name == "torch" or re.search(rf"^{name}=={least}(\.0)*$", oldest, re.MULTILINE), name
    least = re.search(r'"transformers>=([\d.]+)"', project)[1]
    assert least == LEAST_TRANSFORMERS  # which cards name
    assert f"\ntransformers=={least}.0\n" in oldest and f"SUPPORTED := {least}.0 " in makefile
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    assert f"OLDEST_TORCH={torch}.0" in read(".github/workflows/ci.yml")
    assert f"allows is {torch}.0" in makefile and "torch==" not in oldest


def test_the_changelog_tells_of_this_version():
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == hf_tokenreduce.__version__
    assert "version" not in yaml.safe_load(read("CITATION.cff"))  # which would be a second place for it


def test_files_for_github_can_be_read():
    for file in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file
