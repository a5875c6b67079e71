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
            target = target_of(page, found["target"])
            if target is None or files.get_file_from_path(path_in_site(target)) is not None:
                continue
            if target.is_file():
                files.append(File.generated(config, path_in_site(target), abs_src_path=str(target)))
                waiting.append(target)
            else:
                files.append(File.generated(config, path_in_site(target), content=list_of(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change the links whose targets have another place in the site than in the repository."""
    if page.file.abs_src_path is None:  # a list of files, which has no other links
        return markdown
    source, folder = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def replace(found: re.Match[str]) -> str:
        target = target_of(source, found["target"])
        if target is None:
            return found[0]
        return found["before"] + posixpath.relpath(path_in_site(target), folder or ".") + found["after"]

    return LINK.sub(replace, markdown)


def target_of(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that a link leads to; of a folder its README if there is one. None: the
    link leads elsewhere."""
    path = (page.parent / target).resolve()
    if (path / "README.md").is_file():
        path = path / "README.md"
    return path if path.exists() and path.is_relative_to(ROOT) else None


def path_in_site(target: Path) -> str:
    if target == ROOT / "README.md":
        return "index.md"
    path = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT)
    return (path / "index.md" if target.is_dir() else path).as_posix()


def list_of(folder: Path) -> str:
    """A page for a folder without a README: the names of its files."""
    return f"# {folder.name}\n\n" + "".join(f"- `{file.name}`\n" for file in sorted(folder.iterdir()))
