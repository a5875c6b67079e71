"""Check that config.json describes a reduced model, by its values alone: before anything of their size is made."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..modeling.encoders import MODELS, PREFIX, TOWERS, Tower, encoder_config, facts_of, stock_type
from ..modeling.modeling_tokenreduce import reduced_model_class
from ..tasks import Task, takes_texts, task_of
from .code_files import CODE
from .contents import one_line, read_json, short


CLASSES: dict[str, type[PreTrainedModel]] = {
    PREFIX + name: reduced_model_class(getattr(transformers, name)) for name in MODELS
}
CONFIGS: dict[str, Any] = {model.config_class.model_type: model.config_class for model in CLASSES.values()}
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
ENCODERS = {tower.model_type for tower in TOWERS}

# A configuration with larger values is a mistake or an attack. A name also holds for names that end in it:
# "hidden_size" for "decoder_hidden_size".
LARGEST = {
    "hidden_size": 2**16,
    "hidden_sizes": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
    "num_register_tokens": 2**12,
    "num_channels": 2**10,
    "num_mel_bins": 2**12,
    "num_labels": 2**20,
    "head_dim": 2**14,
    "pooler_output_size": 2**16,
    "projection_dim": 2**16,
    "projection_size": 2**16,
    "vocab_size": 2**20,
    "max_position_embeddings": 2**24,
    "max_length": 2**24,
    "encoder_stride": 2**14,
    "frequency_stride": 2**14,
    "time_stride": 2**14,
    "image_size": 2**14,
    "patch_size": 2**14,
}
MAY_BE_ZERO = {"num_register_tokens", "intermediate_size"}
PAIRS = {"image_size", "patch_size"}
LISTS = {"hidden_sizes", "intermediate_size"}
LARGEST_FACTOR = {"mlp_ratio": 64, "reassemble_factors": 64}
LARGEST_INTEGER = 2**32
MOST_ENTRIES = 2**16
MOST_PATCHES = 2**16
NAMES_OF_CLASSES = ("id2label", "label2id")


def check_config(folder: Path) -> Any:
    """Read the configuration of a folder as this package's class, after every value was found sane."""
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
    _check_code(values)
    _check_parts(values)
    _check_sizes(values)
    config_class = CONFIGS[model_type]
    try:
        dense = config_class.from_dict({**values, "reduction": None})
    except Exception as error:  # a strict dataclass raises several kinds
        raise ValueError(f"config.json does not fit {config_class.__name__}: {one_line(error)}") from None
    facts = facts_of(dense)
    if facts.hidden_size % facts.num_attention_heads:
        raise ValueError(
            f"config.json: hidden_size={facts.hidden_size} is no multiple of "
            f"num_attention_heads={facts.num_attention_heads}."
        )
    if min(facts.grid) < 1 or facts.num_patches > MOST_PATCHES:
        raise ValueError(
            f"config.json: {facts.grid[0]} x {facts.grid[1]} patches, where 1 to {MOST_PATCHES:,} can be."
        )
    _check_reduction(values.get("reduction"), facts.num_hidden_layers)
    try:
        return config_class.from_dict(values)
    except Exception as error:
        raise ValueError(f"config.json does not fit {config_class.__name__}: {one_line(error)}") from None


def stock_class(values: Any) -> str | None:
    """Find the stock class that the values of a configuration name; None if a reduced model cannot have it."""
    names = values.get("architectures") if isinstance(values, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    return name.removeprefix(PREFIX) if isinstance(name, str) and name in CLASSES else None


def model_class_of(config: Any) -> type[PreTrainedModel]:
    """Find the reduced class that a configuration names."""
    names = config.architectures or [None]
    if names[0] not in CLASSES:
        raise ValueError(f"config.json has architectures {short(names)}; a reduced model is one of {_known()}.")
    return CLASSES[names[0]]


def task_of_config(config: Any) -> Task:
    return task_of(model_class_of(config).__name__.removeprefix(PREFIX))


def main_input_of(stock: str) -> str:
    """Name the main input of a stock class: pixel_values, or input_values for sounds."""
    return "pixel_values" if takes_texts(stock) else getattr(transformers, stock).main_input_name


def pipeline_of(stock: str) -> str | None:
    """Find the pipeline that runs models of this stock class; None if there is none."""
    task = task_of(stock)
    takes_images_alone = main_input_of(stock) == "pixel_values" and not takes_texts(stock)
    if task.name == "backbone" or (task.name == "image-feature-extraction" and not takes_images_alone):
        return None
    return task.name


def tower_of(config: Any) -> Tower:
    """Find the tower that a configuration describes, alone or as a part."""
    return next(tower for tower in TOWERS if tower.model_type == stock_type(encoder_config(config)))


def _check_code_references(folder: Path, values: dict[str, Any]) -> None:
    """Check that each Auto class finds its class in a file of this folder, and that it is the right class."""
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, dict) or "AutoConfig" not in auto_map:
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
    stock = stock_class(values)
    if stock is None or CLASSES[PREFIX + stock].config_class is not CONFIGS[values["model_type"]]:
        raise ValueError(
            f"config.json has architectures {short(values.get('architectures'))}, where a {values['model_type']} "
            f"model is one of {_known(values['model_type'])}."
        )
    expected = CONFIGS[values["model_type"]](architectures=[PREFIX + stock])._code_references()
    for auto_class, reference in auto_map.items():
        if expected.get(auto_class) != reference:
            raise ValueError(
                f"config.json's auto_map sends {short(auto_class)} to {short(reference)}; for {PREFIX}{stock} it has "
                f"{short(expected.get(auto_class))} there. Save the model with model.save_pretrained(folder)."
            )
    missing = sorted(expected.keys() - auto_map.keys())
    if missing:
        raise ValueError(
            f"config.json has auto_map {short(auto_map)} without {', '.join(missing)}: the Auto classes would not "
            "find its code. Save the model with model.save_pretrained(folder)."
        )


def _known(model_type: str | None = None) -> str:
    return ", ".join(name for name, model in CLASSES.items() if model_type in (None, model.config_class.model_type))


def _dictionaries(values: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a configuration and every dictionary in it, each with its place, such as `vision_config.`."""
    yield place, values
    for name, value in values.items():
        if isinstance(value, dict) and name not in (*NAMES_OF_CLASSES, "auto_map", "reduction"):
            yield from _dictionaries(value, f"{place}{name}.")


def _check_code(values: dict[str, Any]) -> None:
    """Check that no part names code, or a model, that lies outside the folder."""
    for place, part in _dictionaries(values):
        if part.get("quantization_config"):
            raise ValueError(
                f"config.json has {place}quantization_config. Publish the model as it was before it was quantised. "
                "Readers quantise it when they load it: from_pretrained(..., quantization_config=...)."
            )
        for name in ("custom_pipelines", "backbone", *(["auto_map"] if place else [])):
            if part.get(name):
                raise ValueError(f"config.json has {place}{name}, which this library does not write: remove it.")
        for name in ("attn_implementation", "_attn_implementation"):
            if part.get(name) not in ATTENTION:
                raise ValueError(
                    f"config.json has {place}{name} {short(part[name])}, which may be code of another repository. Use "
                    f"one of {', '.join(str(kind) for kind in ATTENTION[1:])}."
                )


def _check_parts(values: dict[str, Any]) -> None:
    """Check that the parts of a larger model are configurations of models of transformers."""
    for name, config_class in CONFIGS[values["model_type"]].sub_configs.items():
        part = values.get(name)
        if not isinstance(part, dict):
            raise ValueError(f"config.json: {name} must be an object, got {short(part)}.")
        if config_class is not transformers.AutoConfig:
            known = {config_class.model_type}
        else:
            known = ENCODERS if name != "text_config" else set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if not isinstance(part.get("model_type"), str) or part["model_type"] not in known:
            which = ", ".join(sorted(known)) if len(known) < 20 else "a causal language model of transformers"
            raise ValueError(
                f"config.json: {name} has model_type {short(part.get('model_type'))}, where there can be {which}."
            )


def _check_sizes(values: dict[str, Any]) -> None:
    for place, part in _dictionaries(values):
        for name, given in part.items():
            if name in NAMES_OF_CLASSES:
                if given is not None and (not isinstance(given, dict) or len(given) > LARGEST["num_labels"]):
                    raise ValueError(
                        f"config.json: {place}{name} must be an object of at most {LARGEST['num_labels']:,} names."
                    )
            elif name in LARGEST_FACTOR:
                _check_factors(f"{place}{name}", given, LARGEST_FACTOR[name])
            elif name != "reduction" and given is not None:
                limit = next((limit for limit in LARGEST if name == limit or name.endswith(f"_{limit}")), None)
                _check_integers(f"{place}{name}", given, limit)


def _check_integers(where: str, given: Any, limit: str | None) -> None:
    if limit is None:
        entries = given if isinstance(given, list) else [given]
        if len(entries) > MOST_ENTRIES:
            raise ValueError(f"config.json: {where} is {short(given)}, where {MOST_ENTRIES:,} is most.")
        if any(isinstance(number, int) and abs(number) > LARGEST_INTEGER for number in entries):
            raise ValueError(f"config.json: {where} is {short(given)}, where {LARGEST_INTEGER:,} is most.")
        return
    least, most = int(limit not in MAY_BE_ZERO), LARGEST[limit]
    several = isinstance(given, list) and (
        (limit in PAIRS and len(given) == 2) or (limit in LISTS and 1 <= len(given) <= LARGEST["num_hidden_layers"])
    )
    for number in given if several else [given]:
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ValueError(f"config.json: {where} must be an integer from {least} to {most:,}, got {short(given)}.")


def _check_factors(where: str, given: Any, most: float) -> None:
    for number in given if isinstance(given, list) and len(given) <= LARGEST["num_hidden_layers"] else [given]:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number or not 0 < number <= most:
            raise ValueError(f"config.json: {where} must be a number above 0, at most {most}, got {short(given)}.")


def _check_reduction(reduction: Any, layers: int) -> None:
    if reduction is not None and not isinstance(reduction, dict):
        raise ValueError(f"config.json: reduction must be an object or null, got {short(reduction)}.")
    for name, given in (reduction or {}).items():
        if isinstance(given, (list, dict, str)) and len(given) > max(layers, 100):
            raise ValueError(f"config.json: reduction has {name} {short(given)}, for {layers} layers.")
        if isinstance(given, int) and abs(given) > MOST_PATCHES:
            raise ValueError(f"config.json: reduction has {name} {short(given)}, where {MOST_PATCHES:,} is most.")
