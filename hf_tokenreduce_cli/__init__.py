"""`tokenreduce`: the package from a terminal. Each command is a few lines over functions that Python code calls.

It is a package of its own, so that help and wrong arguments do not wait for torch: `hf_tokenreduce` is imported by the
commands, when they run.
"""

import errno
import os
import sys

from . import making, measuring, publishing
from .options import app


__all__ = ["app", "main", "making", "measuring", "publishing"]


def main(arguments: list[str] | None = None) -> None:
    """Errors that a user can mend are one line and exit code 2; `--debug` anywhere shows the whole of them. Other
    errors, such as a full memory or a fault of ours, keep their traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    else:
        _hide_messages_of_libraries()
    try:
        app(args=arguments, prog_name="tokenreduce", obj=arguments)
    except Exception as error:
        if debug or not _is_for_the_user(error):
            raise
        print("tokenreduce: " + _one_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def _hide_messages_of_libraries() -> None:
    # Read when they are imported, which takes seconds and is left to the commands.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:  # of a process that reads images: its last line says what happened
        text = text.strip().splitlines()[-1].removeprefix("ValueError: ")
    elif _is_failed_writing(error):
        text = f"A file could not be written ({text}). Free some space, or write elsewhere, and try again."
    return " ".join(text.split())


def _is_failed_writing(error: Exception) -> bool:
    """Whether the disk is full, or a file too large for it; safetensors and torch have errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    own = type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError)
    return own and any(part in str(error) for part in ("I/O error", "PytorchStreamWriter failed"))


def _is_for_the_user(error: Exception) -> bool:
    if _is_failed_writing(error):
        return True
    if isinstance(error, RuntimeError):
        from hf_tokenreduce.hub.publish import PublishError

        return isinstance(error, PublishError)
    return isinstance(error, (ValueError, OSError, ImportError))
