"""The code files of a saved folder: which release they are of, told by their SHA-256.

What a folder says of itself is not believed. Whoever changes a file can write any version into `config.json`, but a
changed file has another SHA-256. So a folder of another version is recognised only if every code file in it is, byte
by byte, what one release had under that name. `released_code.json` lists the files of each release;
`python -m hf_tokenreduce.hub.released` writes it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from ..modeling.version import __version__


MODELING = Path(__file__).parents[1] / "modeling"
CODE = {file.name for file in MODELING.glob("*.py")} - {"__init__.py"}
EARLIER_CODE = {
    "backbone.py", "clustering.py", "configuration_methods.py", "filtering.py", "merging.py",
    "modeling_tokenreduce_deit.py", "modeling_tokenreduce_vit.py", "pruning.py", "reducers.py", "sampling.py",
    "slimming.py",
}  # fmt: skip
RELEASED = Path(__file__).with_name("released_code.json")
EXTRA_TABLE = "extra_methods.py"
MOST_EXTRA_BYTES = 4096  # of EXTRA_TABLE, which is a few lines
MOST_CODE_BYTES = 2**22


class FolderCode(NamedTuple):
    """The code files of a folder.

    Attributes:
        version: The release that all files of this library are of. None if there is no such release.
        foreign: Names of the files that are no code of that release; without a release, of this version.
        names: Names of all code files that may be in the folder.
    """

    version: str | None
    foreign: list[str]
    names: set[str]


def find_code(folder: Path) -> FolderCode:
    """Find out which release the code of a folder is of. Files of two releases, mixed, are of none."""
    extra, released = extra_code(folder), released_code()
    known = CODE.union(*released.values())
    hashes = {name: _hash_in(folder, name) for name in known | extra if (folder / name).is_file()}
    # A model that runs a method of others has a table of its own, which no release had.
    library = {name for name in hashes if name in known and not (extra and name == EXTRA_TABLE)}
    ours = this_code()
    for version, files in ((__version__, ours), *reversed(released.items())):
        if all(files.get(name) == hashes[name] for name in library):
            foreign = sorted(name for name in hashes if files.get(name) != hashes[name])
            return FolderCode(version, foreign, extra | set(files) | CODE)
    return FolderCode(None, sorted(name for name in hashes if ours.get(name) != hashes[name]), extra | CODE)


def this_code() -> dict[str, str]:
    """Return the SHA-256 of each file that this version saves with a model."""
    return {name: hashlib.sha256((MODELING / name).read_bytes()).hexdigest() for name in sorted(CODE)}


def released_code() -> dict[str, dict[str, str]]:
    """Return the SHA-256 of each code file of each released version, the oldest version first."""
    released: dict[str, dict[str, str]] = json.loads(RELEASED.read_text(encoding="utf-8"))
    return released


def extra_code(folder: Path) -> set[str]:
    """Return the files of methods of others, which `extra_methods.py` imports."""
    file = folder / EXTRA_TABLE
    if not file.is_file() or file.stat().st_size > MOST_EXTRA_BYTES:
        return set()
    found = re.findall(r"^from \.(\w+) import", file.read_text(errors="replace"), re.MULTILINE)
    return {f"{name}.py" for name in found}


def _hash_in(folder: Path, name: str) -> str | None:
    """The SHA-256 of a file; None if it lies outside the folder, or is far too large for code."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or path.stat().st_size > MOST_CODE_BYTES:
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
