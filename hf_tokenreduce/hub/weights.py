"""Check that the weights are those that the configuration asks for, by the headers of their files."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .configuration import model_class_of
from .contents import INDEX, WEIGHTS, WHOLE, one_line, read_json, short


def check_weights(folder: Path, files: dict[str, int], config: Any) -> None:
    """Raise a ValueError unless the weight files hold exactly the tensors of the configuration, in their shapes."""
    model_class = model_class_of(config)
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(name for name in files if WEIGHTS.fullmatch(name)):
        found |= _shapes(folder / name)
    if INDEX not in files and WHOLE not in files:
        raise ValueError(f"The weights are in parts, but {INDEX} is missing. Save them again with save_pretrained.")
    if INDEX in files:
        _check_index(read_json(folder / INDEX), files)
    if INDEX in files and WHOLE in files:  # transformers deletes neither when it writes the other
        raise ValueError(
            f"The folder has weights in one file and in parts, of which one is older: {WHOLE} and {INDEX}. "
            f"transformers loads {WHOLE}. Delete what is older, or save the model in a new folder."
        )
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:
        raise ValueError(f"config.json describes no model that can be built: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, source in model.all_tied_weights_keys.items():
        if name not in found and source in found:  # one tensor of two names is saved under one
            wanted.pop(name, None)
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has besides", found.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"Of the tensors that config.json asks for, model.safetensors {what} {len(names)}: {short(min(names))}"
                f"{', ...' if len(names) > 1 else ''}. Save the model and its configuration together: "
                "model.save_pretrained(folder)."
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has the shape {found[name]} in the file, {shape} by config.json.")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name} ({path.stat().st_size:,} bytes) is no whole safetensors file: {one_line(error)}. It may "
            "have been cut short: save or download it again."
        ) from None


def _check_index(index: Any, files: dict[str, int]) -> None:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{INDEX} has no weight_map.")
    for name in {str(file) for file in weight_map.values()}:
        if not WEIGHTS.fullmatch(name) or name not in files:
            older = f" Delete {INDEX} if {WHOLE} has all weights." if WHOLE in files else ""
            raise ValueError(f"{INDEX} points to {short(name)}, which is no weight file of this folder.{older}")
