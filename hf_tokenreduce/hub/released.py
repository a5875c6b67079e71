"""Record the code files of a release, so that later versions recognise folders that it saved.

    python -m hf_tokenreduce.hub.released            # record this version's code in released_code.json
    python -m hf_tokenreduce.hub.released --check    # only say whether it is recorded

Run it when a version is released, after the last change to `hf_tokenreduce/modeling/`.
"""

import argparse
import json

from ..files import write_whole
from . import code_files
from .code_files import __version__, released_code, this_code


def record_release(version: str, files: dict[str, str], replace: bool = False) -> bool:
    """Write the SHA-256 of each code file of a version to `released_code.json`.

    Args:
        version: The version, such as "0.2.0".
        files: The SHA-256 of each file, by its name.
        replace: Change the record of a version that is there with other files.

    Returns:
        Whether the record changed.

    Raises:
        ValueError: If the version is recorded with other files and `replace` is not set.
    """
    released = released_code()
    if released.get(version) == files:
        return False
    if version in released and not replace:
        raise ValueError(
            f"{version} is recorded with other code. If it has been released, raise the version in "
            "hf_tokenreduce/modeling/version.py; if not, pass --replace."
        )
    released[version] = files  # a version that is there keeps its place
    write_whole(code_files.RELEASED, json.dumps(released, indent=1) + "\n")
    return True


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None takes those of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_tokenreduce.hub.released", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; exit 1 if this version is not recorded.")
    parser.add_argument("--replace", action="store_true", help="Change the record of a version that was not released.")
    args = parser.parse_args(arguments)
    files = this_code()
    if args.check:
        if released_code().get(__version__) != files:
            raise SystemExit(
                f"The code of {__version__} is not recorded. Before it is released, run "
                "`python -m hf_tokenreduce.hub.released` and commit hf_tokenreduce/hub/released_code.json."
            )
        print(f"The code of {__version__} is recorded: {len(files)} files.")
        return
    try:
        changed = record_release(__version__, files, args.replace)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{len(files)} files of {__version__} are {'now' if changed else 'already'} in {code_files.RELEASED}.")


if __name__ == "__main__":
    main()
