"""Say in one line which file of a model's folder is broken, if transformers cannot load the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .modeling.encoders import MODELS, PREFIX
from .tasks import takes_texts


@contextmanager
def blaming(name: str, file: str, config: PreTrainedConfig | None = None) -> Iterator[None]:
    """Turn an error while a file of a folder or Hub id is read into a ValueError that names the file.

    Args:
        name: The folder or Hub id.
        file: Name of the file that is read.
        config: Configuration of the model, if a model is being built. If transformers' own class accepts the
            configuration and the weights fit, the error is a fault of this package, and it is raised unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if file == "preprocessor_config.json" and (Path(name) / "config.json").is_file():
            raise ValueError(
                f"{name!r} has no usable {file}, so nobody knows how to prepare its images. Save the image processor "
                f"of the original model there: AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained({name!r})."
            ) from error
        if not Path(name).exists() and "/" not in name:
            raise ValueError(
                f"There is no folder {name!r} here, and it could not be loaded from the Hub: {one_sentence(error)}"
            ) from error
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
            if isinstance(shapes, Exception):
                why = shapes
            elif "ignore_mismatched_sizes" in str(error):
                file, why = "model.safetensors", "its tensors have other shapes than config.json asks for"
            elif shapes is not None and _was_in_our_code(error):
                raise
        raise ValueError(
            f"{file} of {name!r} cannot be used: {one_sentence(why)} Compare the file with that of the original "
            "model, or save or download the model again."
        ) from error


def check_sizes(name: str, config: PreTrainedConfig) -> None:
    """Raise a ValueError if a folder's weights do not fit its configuration, before a model of that size is built.

    A wrong size in config.json may need more memory than there is. Only local weights are checked. Quantised weights
    are not checked, because they have other shapes.
    """
    folder = Path(name)
    if not any(folder.glob("*.safetensors")) or hasattr(config, "quantization_config"):
        return
    values = config.to_dict()
    if architecture_of(config) in MODELS and not takes_texts(str(architecture_of(config))):
        values.pop("text_config", None)  # a classifier of CLIP has the image side alone
    depths = [part.get("num_hidden_layers") for part in (values, *values.values()) if isinstance(part, dict)]
    wanted = max((depth for depth in depths if isinstance(depth, int)), default=0)
    layers = [int(number) for key in _weight_shapes(folder) for number in re.findall(r"\.(\d+)\.", key)]
    if wanted > max(layers, default=-1) + 1:
        raise ValueError(f"it has {max(layers, default=-1) + 1} layers, but config.json asks for {wanted}")
    shapes = _shapes(config)
    if not isinstance(shapes, dict):
        return
    for key, found in _weight_shapes(folder).items():
        if shapes.get(key, found) != found:
            raise ValueError(f"{key} has the shape {found}, but config.json asks for {shapes[key]}")


def one_sentence(error: BaseException | str, most: int = 200) -> str:
    """Return an error's message on one line, with the type of the error if that says more."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (str, ValueError, OSError, SafetensorError)):
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= most else text[:most] + "..."
    return text if text.endswith((".", "!")) else text + "."


def architecture_of(config: PreTrainedConfig) -> str | None:
    """Return the stock class that a configuration names, also if it names the reduced form. None: it names none."""
    names = config.architectures
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"architectures must be a list with the name of a class, got {names!r}")
    return names[0].removeprefix(PREFIX)


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | Exception | None:
    """Return the shapes of all parameters that transformers' own class has with this configuration.

    Returns the error if the class cannot be built, or None if the class is not one that can be reduced.
    """
    name = architecture_of(config)
    if name not in MODELS:
        return None
    stock: Any = getattr(transformers, name)
    added = ("model_type", "reduction", "auto_map")
    try:
        values = {key: value for key, value in config.to_dict().items() if key not in added}
        with torch.device("meta"):
            model = stock(stock.config_class(**values, attn_implementation=config._attn_implementation))
    except Exception as error:
        return error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _was_in_our_code(error: BaseException) -> bool:
    """Return whether an error was raised in `modeling/`. Then it is a fault of this package."""
    place, modeling = error.__traceback__, str(Path(__file__).parent / "modeling")
    while place is not None:
        code = place.tb_frame.f_code
        # Our `from_pretrained` calls the stock one, and passes its errors on.
        if code.co_filename.startswith(modeling) and code.co_name != "from_pretrained":
            return True
        place = place.tb_next
    return False


def _weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's weights, from the headers of their files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found.update({key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()})  # noqa: SIM118
    return found
