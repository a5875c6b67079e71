"""What a published folder may hold, judged from names, sizes and headers: nothing in it is run, no weight is read."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..modeling.encoders import MODELS, PREFIX
from ..modeling.modeling_tokenreduce import reduced_model_class


MODELING = Path(__file__).parents[1] / "modeling"
CODE = {file.name for file in MODELING.glob("*.py")} - {"__init__.py"}
PLAIN = CODE | {"README.md", "LICENSE", ".gitattributes", "record.json", "token_map.png", "thresholds.safetensors"}
NEEDED = {"config.json", "preprocessor_config.json"}
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICTURE = re.compile(r"images/[\w-][\w.-]*\.png")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
NEVER_UPLOADED = {".git", ".cache", "__pycache__"}

CLASSES: dict[str, type[PreTrainedModel]] = {
    PREFIX + name: reduced_model_class(getattr(transformers, name)) for name in MODELS
}
CONFIGS: dict[str, Any] = {model.config_class.model_type: model.config_class for model in CLASSES.values()}
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

# Beyond these a configuration is a mistake or an attack, and is refused before anything of its size exists.
LARGEST = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**10,
    "num_channels": 2**10,
    "pooler_output_size": 2**16,
    "encoder_stride": 2**14,
    "image_size": 2**14,
    "patch_size": 2**14,
    "num_labels": 2**20,
}
MOST_PATCHES = 2**16
MOST_PIXELS = 2**12  # of a side, after the processor
JSON_BYTES = 2**26


def list_files(folder: Path) -> tuple[dict[str, int], list[str], list[str]]:
    """The files that belong to a published model with their sizes, what speaks against those that are there, and
    the files that do not belong, each with the reason."""
    files: dict[str, int] = {}
    errors: list[str] = []
    others: list[str] = []
    root = folder.resolve()
    for name, path in _entries(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            errors.append(f"{name} is a link out of the folder. Put the file itself there (cp -L follows links).")
        elif path.is_dir():
            others.append(f"{name}/ {_why_not(name, is_folder=True)}")
        elif not path.is_file():
            errors.append(f"{name} is no readable file.")
        elif name in PLAIN | NEEDED | {INDEX} or WEIGHTS.fullmatch(name) or PICTURE.fullmatch(name):
            files[name] = path.stat().st_size
        else:
            others.append(f"{name} {_why_not(name)}")
    errors += [f"{name} is missing. {_remedy(name)}" for name in sorted(NEEDED - files.keys())]
    if not any(WEIGHTS.fullmatch(name) for name in files):
        errors.append("model.safetensors is missing. Save the model with model.save_pretrained(folder).")
    return files, errors, others


def read_json(path: Path) -> Any:
    """The content of a JSON file; a ValueError that names it if that is none, or is unreasonably long."""
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, which no such file needs.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {one_line(error)}.") from None


def check_config(folder: Path) -> Any:
    """The configuration of the folder as this package's class, after every value was found sane."""
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise ValueError(f"config.json must hold an object, got {short(values)}.")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise ValueError(
            f"config.json has model_type {short(model_type)}; a reduced model has one of {', '.join(CONFIGS)}. Reduce "
            "it with reduce_tokens, then save it."
        )
    _check_code_references(folder, values)
    _check_sizes(values)
    try:
        return CONFIGS[model_type].from_dict(values)
    except Exception as error:  # a strict dataclass raises several kinds
        raise ValueError(f"config.json does not fit {CONFIGS[model_type].__name__}: {one_line(error)}") from None


def check_processor(folder: Path) -> None:
    processor = read_json(folder / "preprocessor_config.json")
    if not isinstance(processor, dict):
        raise ValueError(f"preprocessor_config.json must hold an object, got {short(processor)}.")
    if processor.get("auto_map"):
        raise ValueError("preprocessor_config.json has an auto_map: a processor with code of its own is not taken.")
    for name in ("size", "crop_size"):
        sizes = processor.get(name) or 1
        for side in sizes.values() if isinstance(sizes, dict) else [sizes]:
            if not isinstance(side, int) or not 1 <= side <= MOST_PIXELS:
                raise ValueError(
                    f"preprocessor_config.json: {name} must have sides from 1 to {MOST_PIXELS:,} pixels, got "
                    f"{short(sizes)}."
                )


def model_class_of(config: Any) -> type[PreTrainedModel]:
    names = config.architectures or [None]
    if names[0] not in CLASSES:
        raise ValueError(
            f"config.json has architectures {short(names)}; a classifier is published as one of {', '.join(CLASSES)}."
        )
    return CLASSES[names[0]]


def check_weights(folder: Path, files: dict[str, int], config: Any) -> None:
    """Raise a ValueError unless the headers of the weight files name exactly the tensors that the configuration asks
    for, in their shapes."""
    model_class = model_class_of(config)
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(name for name in files if WEIGHTS.fullmatch(name)):
        found |= _shapes(folder / name)
    if INDEX not in files and "model.safetensors" not in files:
        raise ValueError(f"The weights are in parts, but {INDEX} is missing. Save them again with save_pretrained.")
    if INDEX in files:
        _check_index(read_json(folder / INDEX), files)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:
        raise ValueError(f"config.json describes no model that can be built: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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


def differing_code(folder: Path, files: dict[str, int]) -> list[str]:
    """The code files that are not, byte by byte, this package's."""
    return sorted(n for n in CODE & files.keys() if (folder / n).read_bytes() != (MODELING / n).read_bytes())


def short(value: Any, most: int = 80) -> str:
    """What was given, for an error message: one line, cut where it is long."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} entries"
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[:most] + "..."


def one_line(error: BaseException | str, most: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file, and every folder that is not looked into: only images/ is."""
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if entry in NEVER_UPLOADED:
            continue
        if entry == "images" and path.is_dir() and not path.is_symlink():
            for inner in sorted(os.listdir(path)):
                yield f"images/{inner}", path / inner
        else:
            yield entry, path


def _why_not(name: str, is_folder: bool = False) -> str:
    if is_folder and name.startswith("checkpoint-"):
        return "is a training checkpoint, with its optimizer. Leave it out with --skip-others."
    if Path(name).suffix.lower() in PICKLED:
        return "may hold pickled objects, which run code when loaded. Delete it, or leave it out with --skip-others."
    return "does not belong to a published model. Delete it, or leave it out with --skip-others."


def _remedy(name: str) -> str:
    what = {"config.json": "the model with model", "preprocessor_config.json": "the image processor with processor"}
    return f"Save {what[name]}.save_pretrained(folder)."


def _check_code_references(folder: Path, values: dict[str, Any]) -> None:
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, dict) or not {"AutoConfig", "AutoModelForImageClassification"} <= auto_map.keys():
        raise ValueError(
            f"config.json has auto_map {short(auto_map)}: the Auto classes would not find its code. Save the model "
            "with model.save_pretrained(folder)."
        )
    for auto_class, reference in auto_map.items():
        if not isinstance(reference, str) or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", reference):
            raise ValueError(
                f"config.json's auto_map sends {short(auto_class)} to {short(reference)}, outside this folder. It "
                "must be module.Class with module.py in the folder."
            )
        file = reference.split(".")[0] + ".py"
        if file not in CODE or not (folder / file).is_file():
            raise ValueError(
                f"config.json's auto_map sends {short(auto_class)} to {short(reference)}, but {file} is "
                f"{'not in the folder' if file in CODE else 'no file of this library'}. Save the model with "
                "model.save_pretrained(folder)."
            )
    architectures = values.get("architectures") or [None]
    if auto_map["AutoModelForImageClassification"].split(".")[1] != architectures[0]:
        raise ValueError(
            f"config.json's auto_map names {auto_map['AutoModelForImageClassification']}, its architectures "
            f"{short(architectures)}."
        )
    for name in ("custom_pipelines", "quantization_config"):
        if values.get(name):
            raise ValueError(f"config.json has {name}, which this library does not write: remove it.")
    for name in ("attn_implementation", "_attn_implementation"):
        if values.get(name) not in ATTENTION:
            raise ValueError(
                f"config.json has {name} {short(values[name])}, which may be code of another repository. Use one of "
                f"{', '.join(str(kind) for kind in ATTENTION[1:])}."
            )


def _check_sizes(values: dict[str, Any]) -> None:
    for name, most in LARGEST.items():
        given = values.get(name, 1)
        pair = name in ("image_size", "patch_size") and isinstance(given, list) and len(given) == 2
        for number in given if pair else [given]:
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
                raise ValueError(f"config.json: {name} must be an integer from 1 to {most:,}, got {short(given)}.")
    stock = CONFIGS[values["model_type"]]()
    width, heads = (values.get(name, getattr(stock, name)) for name in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise ValueError(f"config.json: hidden_size={width} is no multiple of num_attention_heads={heads}.")
    sides = []
    for axis in (0, 1):
        sizes = (values.get(name, getattr(stock, name)) for name in ("image_size", "patch_size"))
        image, patch = (size[axis] if isinstance(size, (list, tuple)) else size for size in sizes)
        sides.append(image // patch)
    if not 1 <= sides[0] * sides[1] <= MOST_PATCHES:
        raise ValueError(f"config.json: {sides[0]} x {sides[1]} patches, where 1 to {MOST_PATCHES:,} can be.")
    labels = values.get("id2label") or {}
    if not isinstance(labels, dict) or len(labels) > LARGEST["num_labels"]:
        raise ValueError(f"config.json: id2label must be an object of at most {LARGEST['num_labels']:,} names.")
    reduction = values.get("reduction")
    if reduction is not None and not isinstance(reduction, dict):
        raise ValueError(f"config.json: reduction must be an object or null, got {short(reduction)}.")
    layers = values.get("num_hidden_layers", stock.num_hidden_layers)
    for name, given in (reduction or {}).items():
        if isinstance(given, (list, dict, str)) and len(given) > max(layers, 100):
            raise ValueError(f"config.json: reduction has {name} {short(given)}, for {layers} layers.")
        if isinstance(given, int) and abs(given) > MOST_PATCHES:
            raise ValueError(f"config.json: reduction has {name} {short(given)}, where {MOST_PATCHES:,} is most.")


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
            raise ValueError(f"{INDEX} points to {short(name)}, which is no weight file of this folder.")
