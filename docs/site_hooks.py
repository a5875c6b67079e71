"""Hooks of MkDocs: files outside `docs/` that the pages link to become part of the site.

The pages are read on GitHub too, so their links lead to the real places of files, such as `../CONTRIBUTING.md`. In the
site a file of `docs/` has its path below `docs/`, and every other file has its path below the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(?P<before>\]\(<?)(?P<target>[^)#>\s:]+)(?P<after>[^)]*\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside `docs/` that pages link to, and those that these link to."""
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for found in LINK.finditer(page.read_text()):
            target = file_of(page, found["target"])
            if target is not None and files.get_file_from_path(path_in_site(target)) is None:
                files.append(File.generated(config, path_in_site(target), abs_src_path=str(target)))
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change the links whose targets have another place in the site than in the repository."""
    source, folder = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def replace(found: re.Match[str]) -> str:
        target = file_of(source, found["target"])
        if target is None:
            return found[0]
        return found["before"] + posixpath.relpath(path_in_site(target), folder or ".") + found["after"]

    return LINK.sub(replace, markdown)


def file_of(page: Path, target: str) -> Path | None:
    """The file of the repository that a link leads to; of a folder its README. None: it is no such link."""
    path = (page.parent / target).resolve()
    if path.is_dir():
        path = path / "README.md"
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def path_in_site(file: Path) -> str:
    if file == ROOT / "README.md":
        return "index.md"
    return file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT).as_posix()
