"""The command line, `tokenreduce`. Each command is a few lines around functions of `hf_tokenreduce`.

It is a separate package, so that help texts and errors about arguments do not wait for torch: a command imports
`hf_tokenreduce` when it runs.
"""

import errno
import os
import sys

from . import making, measuring, publishing
from .options import app


__all__ = ["app", "main", "making", "measuring", "publishing"]


# Trainer has a --debug too. It takes one of these values.
DEBUG_OF_TRAINER = ("underflow_overflow", "tpu_metrics_debug")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    An error that the user can solve is printed in one line, and the exit code is 2. With `--debug` anywhere in the
    arguments it keeps its traceback. Other errors, such as a full memory or a bug, always keep their traceback.

    Args:
        arguments: The arguments. None: those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    following = [*arguments[1:], None]
    ours = [i for i, word in enumerate(arguments) if word == "--debug" and following[i] not in DEBUG_OF_TRAINER]
    debug = bool(ours)
    if debug:
        arguments.pop(ours[0])
    else:
        _hide_messages_of_libraries()
    for stream in (sys.stdout, sys.stderr):  # a name that they cannot show must not stop a run, as it would on Windows
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=arguments, prog_name="tokenreduce", obj=arguments)
    except Exception as error:
        if debug or not _is_for_the_user(error):
            raise
        print("tokenreduce: " + _one_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def _hide_messages_of_libraries() -> None:
    # The libraries read these variables when they are imported. That takes seconds, so only the commands do it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:  # from a process that reads images; its last line says what happened
        text = text.strip().splitlines()[-1].removeprefix("ValueError: ")
    elif _is_failed_writing(error):
        text = f"A file could not be written ({text}). Free some disk space or write to another disk, and try again."
    return " ".join(text.split())


def _is_failed_writing(error: Exception) -> bool:
    """Whether the disk is full or a file is too large for it. safetensors and torch have their own errors for that."""
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
