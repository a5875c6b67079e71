"""Put the tests that transformers ships in its source distribution, and not in its wheel, into a folder.

    python tests/conformance/fetch.py FOLDER

FOLDER/tests holds those of the installed version. pip fetches them from wherever it is set up to fetch packages.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def fetch(folder: Path) -> None:
    wanted = version("transformers")
    marker = folder / "VERSION"
    if marker.is_file() and marker.read_text() == wanted:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the last step is a rename: the folder is there complete, or not at all.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        unpack(download(wanted, Path(temporary)), new)
        (new / "VERSION").write_text(wanted)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)


def download(wanted: str, folder: Path) -> Path:
    """pip builds the package's metadata even for a mere download; it brings the build tools for that itself."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    subprocess.run([*command, "--no-deps", "--no-binary", "transformers", f"transformers=={wanted}"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Only `tests`: a second copy of the package must not come near the installed one."""
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = member.name.partition("/")[2]  # without the folder that holds all
            if path.startswith("tests/"):
                source.extract(member.replace(name=path), folder, filter="data")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)
