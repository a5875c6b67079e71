"""What is written is whole or not there, whenever the process is killed."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import tiny_images, tiny_model
from transformers import ViTImageProcessor

from hf_tokenreduce import EViTConfig, ToMeConfig, reduce_tokens
from hf_tokenreduce.files import check_new_folder, model_folder, whole, write_whole
from hf_tokenreduce.loading import load_model


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="module")
def models():
    """An old model and a new one, of other weights, settings and files."""
    torch.manual_seed(0)
    old, new = tiny_model(), tiny_model(num_hidden_layers=3)
    return reduce_tokens(old, ToMeConfig(r=4)), reduce_tokens(new, EViTConfig(layers=(1,), keep_rate=0.5))


def what_loads(folder):
    """What a folder computes; None if it does not load."""
    try:
        model, _ = load_model(str(folder))
    except ValueError:
        return None
    with torch.no_grad():
        return model(tiny_images()).logits


def killed_at(step, work):
    """Do work in a process that is killed before its file operation of this number. Returns whether it was."""
    child = os.fork()
    if child == 0:
        left = [step]

        def counting(function):
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        for name in ("replace", "unlink", "mkdir", "rename", "rmdir"):
            setattr(os, name, counting(getattr(os, name)))
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_folder_is_never_a_mixture(tmp_path, models):
    (old, new), images = models, tiny_images()
    save(old, tmp_path / "old")
    save(new, tmp_path / "new")
    (tmp_path / "old" / "README.md").write_text("The card of the old model")
    with torch.no_grad():
        known = {"old": old(images).logits, "new": new(images).logits}
    folder, seen, step = tmp_path / "model", [], 0

    def replace_by_copy():
        with model_folder(folder, with_card=True) as place:
            shutil.copytree(tmp_path / "new", place, dirs_exist_ok=True)

    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        (folder / "checkpoint-3").mkdir()
        (folder / "my_own.py").touch()
        killed = killed_at(step, replace_by_copy)
        found = what_loads(folder)
        same = [name for name, logits in known.items() if found is not None and torch.equal(found, logits)]
        assert found is None or same, "a mixture loads"
        seen.append("".join(same))
        assert (folder / "checkpoint-3").is_dir() and (folder / "my_own.py").is_file()
        if not killed:
            break
        step += 1
    # First the old one, then none, at the end the new one.
    order = [name for index, name in enumerate(seen) if index == 0 or seen[index - 1] != name]
    assert order == ["old", "", "new"] and len(seen) > 20
    assert set(os.listdir(folder)) == {*os.listdir(tmp_path / "new"), "checkpoint-3", "my_own.py"}
    killed_at(3, replace_by_copy)
    (folder / f".{os.getpid()}.part").mkdir()  # in a container, a process that was killed can have had our number
    replace_by_copy()  # takes away what the killed ones left
    assert not list(folder.glob(".*"))


def test_work_that_fails_changes_nothing(tmp_path, models):
    save(models[0], tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(OSError, match="No space"), model_folder(tmp_path / "model") as place:
        models[1].save_pretrained(place)
        raise OSError(28, "No space left on device")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_where_a_model_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, overwrite, message in (
        ("", False, "is empty"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "model", False, "is not empty.*--overwrite"),
        (tmp_path / "photos", True, "no model"),
        (tmp_path / "link", False, "is a link to .*nowhere, which does not exist"),
        (tmp_path / "file" / "new", False, "cannot be written, because .*file takes no new files"),
    ):
        with pytest.raises(ValueError, match=message):
            check_new_folder(folder, overwrite)
    for folder, overwrite in ((tmp_path / "new", False), (tmp_path / "model", True)):
        assert check_new_folder(folder, overwrite) == folder
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(ValueError, match=r"because .* takes no new files"):
        check_new_folder(tmp_path / "new" / "folder")


def test_writers_do_not_meet(tmp_path):
    file, errors = tmp_path / "file", []
    texts = {name * 50_000 for name in "abc"}

    def write(text):
        try:
            for _ in range(40):
                write_whole(file, text)
                assert file.read_text() in texts
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [left.name for left in tmp_path.iterdir()] == ["file"]


def test_what_windows_asks_for(tmp_path, monkeypatch):
    """It syncs only files that are open for writing, and `os.kill` would end a process that is only asked about."""

    asked = []

    def sync(number):
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(psutil, "pid_exists", lambda number: asked.append(number) or number == os.getppid())
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    parent = tmp_path / f".{os.getppid()}.part"
    for left in (parent, tmp_path / f".{gone.pid}.part", tmp_path / ".x.part"):
        left.mkdir()
    with model_folder(tmp_path):
        assert parent.is_dir() and not (tmp_path / f".{gone.pid}.part").exists()
        assert not (tmp_path / ".x.part").exists()
    assert sorted(asked) == sorted([os.getppid(), gone.pid])


def test_an_error_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), whole(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_commands_killed_at_any_moment(tmp_path, models):
    """50 times: whatever is in the folder computes what one of the two commands would have left, or does not load."""
    torch.manual_seed(0)
    save(tiny_model(), tmp_path / "stock")
    code = "from hf_tokenreduce_cli import main; main()"
    arguments = [sys.executable, "-c", code, "reduce", str(tmp_path / "stock"), "--overwrite"]
    reduced = {r: [*arguments, "-r", "tome", "--reduction-args", json.dumps({"r": r})] for r in (3, 9)}
    known = {}
    for r, command in reduced.items():
        begin = time.perf_counter()
        subprocess.run([*command, "-o", str(tmp_path / f"whole-{r}")], check=True, capture_output=True)
        seconds = time.perf_counter() - begin
        known[r] = what_loads(tmp_path / f"whole-{r}")
    folder, outcomes, moments = tmp_path / "model", [], random.Random(0)
    shutil.copytree(tmp_path / "whole-3", folder)
    for number in range(50):
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "whole-3", folder)
        process = subprocess.Popen([*reduced[(3, 9)[number % 2]], "-o", str(folder)], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        time.sleep(seconds * moments.uniform(0.5, 1.1))
        process.kill()
        process.wait()
        found = what_loads(folder)
        assert found is None or any(torch.equal(found, logits) for logits in known.values())
        outcomes.append(found is not None)
    assert any(outcomes)


def test_the_helper_of_this_file_kills(tmp_path):
    assert killed_at(0, lambda: os.mkdir(tmp_path / "a")) and not (tmp_path / "a").exists()
    assert not killed_at(1, lambda: os.mkdir(tmp_path / "b")) and Path(tmp_path / "b").is_dir()


def test_a_folder_of_somebody_keeps_what_is_theirs(tmp_path, models):
    """As where a training writes into the folder it is started in."""
    theirs = {"README.md": "mine", "train.py": "print()", "data.bin": "x", "notes_config.json": "{}"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):
        with model_folder(tmp_path) as place:
            save(models[0], place)
        assert {name: (tmp_path / name).read_text() for name in theirs} == theirs
    assert what_loads(tmp_path) is not None


def test_a_replacement_that_was_killed_can_be_repeated(tmp_path, models):
    save(models[1], tmp_path / "new")

    def replace_by_copy():
        with model_folder(tmp_path / "model") as place:
            shutil.copytree(tmp_path / "new", place, dirs_exist_ok=True)

    save(models[0], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")  # it does not belong to the new model
    step = 0
    while (tmp_path / "model" / "config.json").is_file():
        assert killed_at(step, replace_by_copy)
        step += 1
    for step in (2, 3):  # killed again, while it begins
        assert check_new_folder(tmp_path / "model", overwrite=True)
        assert killed_at(step, replace_by_copy)
    assert check_new_folder(tmp_path / "model", overwrite=True)
    replace_by_copy()
    assert set(os.listdir(tmp_path / "model")) == set(os.listdir(tmp_path / "new"))
