"""Which file of a model's folder is at fault, in one line, when transformers cannot load it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .modeling.encoders import MODELS, PREFIX


@contextmanager
def blaming(name: str, file: str, config: PreTrainedConfig | None = None) -> Iterator[None]:
    """Turn what is raised while a file of a folder or Hub id is read into a ValueError that names the file.

    config: of a model that is being built. What transformers' own class takes is not the configuration's fault, and
        if the weights fit it, not the user's: that error is raised as it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name!r} could not be loaded: {one_sentence(error)} It must be a folder with config.json, "
            "model.safetensors and preprocessor_config.json, or the id of such a repository on the Hub."
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise
        why: Exception | str = error
        if config is not None:
            shapes = _shapes(config)
            if isinstance(shapes, dict):
                mismatch = _mismatch(Path(name), shapes)
                if mismatch is None and "ignore_mismatched_sizes" in str(error):
                    mismatch = "its tensors have other shapes than config.json asks for"
                if mismatch is not None:
                    file, why = "model.safetensors", mismatch
                elif _was_in_our_code(error):
                    raise
            elif shapes is not None:
                why = shapes
        raise ValueError(
            f"{file} of {name!r} cannot be used: {one_sentence(why)} Compare it with that of the model it was made "
            "of, or save or download the model again."
        ) from error


def one_sentence(error: BaseException | str, most: int = 200) -> str:
    """An error's message on one line, with its kind where that says more."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (str, ValueError, OSError, SafetensorError)):
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= most else text[:most] + "..."
    return text if text.endswith((".", "!")) else text + "."


def architecture_of(config: PreTrainedConfig) -> str | None:
    """The stock class that a configuration names, or whose reduced form it names. None: it names none."""
    names = config.architectures
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"architectures must be a list with the name of a class, got {names!r}")
    return names[0].removeprefix(PREFIX)


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | Exception | None:
    """The shapes of the parameters that transformers' own class has by a configuration, or why it has none. None: it
    is no class that can be reduced."""
    name = architecture_of(config)
    if name not in MODELS:
        return None
    stock: Any = getattr(transformers, name)
    ours = ("model_type", "reduction", "auto_map")
    try:
        values = {key: value for key, value in config.to_dict().items() if key not in ours}
        with torch.device("meta"):
            model = stock(stock.config_class(**values, attn_implementation=config._attn_implementation))
    except Exception as error:
        return error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _was_in_our_code(error: BaseException) -> bool:
    """Whether our models were at work when it was raised: then it is a fault of ours."""
    place, modeling = error.__traceback__, str(Path(__file__).parent / "modeling")
    while place is not None:
        if place.tb_frame.f_code.co_filename.startswith(modeling):
            return True
        place = place.tb_next
    return False


def _mismatch(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """A tensor of a folder's weights that has another shape."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                found = tuple(weights.get_slice(key).get_shape())
                if shapes.get(key, found) != found:
                    return f"{key} has the shape {found}, and {shapes[key]} by config.json"
    return None
