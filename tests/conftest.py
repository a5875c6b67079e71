import gc
import os
import shutil
import tempfile


# Before transformers is imported: nothing may reach for the network, nor share a module cache with other runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For the processes that tests start. Two threads of a tiny model, on cores that others use too, mostly wait in a loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import SHARED, saved
from transformers.utils import logging

from hf_tokenreduce.methods.sit import fit_slimming
from hf_tokenreduce_cli import main


torch.set_num_threads(1)
# Of 600. A test that looks at what SiT's networks have learned gives a number of its own.
fit_slimming.__kwdefaults__["steps"] = 20
logging.disable_progress_bar()


def pytest_collection_finish():
    """Collecting garbage looks at every object, and each collected test is many of them. They stay to the end anyway.
    Frozen objects are not looked at, which saves time, most of all in tests that train."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """The folder with real weights and photographs, which lies beside a checkout where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"no real weights and photographs: {SHARED} is not there (set TOKENREDUCE_SHARED to point to it)")
    return SHARED


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a reduced model, which no test changes."""
    return saved(tmp_path_factory.mktemp("good"), "vit", "evit")[1]


@pytest.fixture
def folder(good, tmp_path):
    """A copy of that folder, for a test that changes it."""
    return shutil.copytree(good, tmp_path / "reduced")


@pytest.fixture
def call(capsys):
    """Runs a command; returns exit code, output, errors."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return call
