"""Whether transformers is as the table of encoders says. To be run first when a new version of it comes out:

    python tests/scan_families.py

Every class that the table names is made small and looked at: where its layers are, which parts they have, which of
them nobody here knows, and whether the facts that are computed from a configuration are those of the modules. Prints a
line for each class, and exits with 1 and the list of what has changed. It needs no test runner, and of this package
nothing but `modeling`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING


if __name__ == "__main__":  # the package itself asks for all classes of the table, so it fails where one is gone
    _package = ModuleType("hf_tokenreduce")
    _package.__path__ = [str(Path(__file__).resolve().parents[1] / "hf_tokenreduce")]
    sys.modules["hf_tokenreduce"] = _package

from hf_tokenreduce.modeling.encoders import (
    COMPOSITES,
    MODELS,
    READ_EVERY_PATCH,
    TOWERS,
    Encoder,
    Tower,
    facts_of,
)


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}

# Settings of which only some families know one: each makes another kind of layer.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"drop_path_rate": 0.5},
    {"use_swiglu_ffn": True},
    {"use_gated_mlp": True},
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True},
    {"num_register_tokens": 3},
)


def scan(towers: Iterable[Tower] = TOWERS, say: Callable[[str], None] = print) -> list[str]:
    """What is not as the table says, each with the name of its class."""
    changed = []

    def note(kind: str, name: str, problems: Iterable[str]) -> None:
        found = list(dict.fromkeys(problems))
        say(f"{kind:<30} {name:<42} {'; '.join(found) or 'as the table says'}")
        changed.extend(f"{name}: {problem}" for problem in found)

    for tower in towers:
        for name in dict.fromkeys((*tower.classes, *tower.models)):
            note(tower.model_type, name, problems_of_class(tower, name))
    for name in COMPOSITES:
        note("of several parts", name, problems_of_composite(name))
    for name in (*MODELS, *READ_EVERY_PATCH):
        if not hasattr(transformers, name):
            note("named elsewhere", name, ["transformers has no such class"])
    return changed


def problems_of_class(tower: Tower, name: str) -> Iterator[str]:
    stock = getattr(transformers, name, None)
    if stock is None:
        yield "transformers has no such class"
        return
    if tower.model_type not in CONFIG_MAPPING:
        yield f"there is no model type {tower.model_type!r}"
        return
    for changes in VARIANTS:
        config = tiny_config(tower, changes)
        if config is None:
            continue
        try:
            model = stock(config if stock.config_class is type(config) else around(stock.config_class, config))
        except Exception as error:
            yield f"cannot be made with {changes}: {error!r}"
            continue
        yield from problems_of_model(tower, model.eval())


def tiny_config(tower: Tower, changes: dict[str, Any]) -> Any:
    """None if the family does not know one of the changes."""
    config_class = CONFIG_MAPPING[tower.model_type]
    known = config_class()
    if any(not hasattr(known, name) for name in changes):
        return None
    return config_class(
        **{name: value for name, value in SIZES.items() if hasattr(known, name)}, **(tower.fixed or {}), **changes
    )


def around(config_class: Any, config: Any) -> Any:
    """The configuration of a model of which the encoder is a part."""
    texts = {part: TEXT for part in config_class.sub_configs if part.startswith("text")}
    return config_class(vision_config=config.to_dict(), **texts)


def problems_of_composite(name: str) -> Iterator[str]:
    stock = getattr(transformers, name, None)
    if stock is None:
        yield "transformers has no such class"
        return
    towers = {tower.model_type: tower for tower in TOWERS}
    if name.startswith("Llava"):
        tower = towers["clip_vision_model"]
        text = transformers.LlamaConfig(**TEXT, num_key_value_heads=3)
        parts = {"vision_config": tiny_config(tower, {}).to_dict(), "text_config": text.to_dict()}
        config = transformers.LlavaConfig(**parts, image_token_id=49, vision_feature_layer=-2)
    else:
        tower = towers["dinov2"]
        fields = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_labels")}
        backbone = transformers.Dinov2Config(
            **{**fields, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
        )
        sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8}
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone, patch_size=8, reassemble_hidden_size=48, **sizes
        )
    yield from problems_of_model(tower, stock(config).eval())


def problems_of_model(tower: Tower, model: Any) -> Iterator[str]:
    holders = [part for part in model.modules() if type(part).__name__ in tower.classes]
    if not holders:
        yield f"holds none of {', '.join(tower.classes)}"
        return
    encoder = Encoder(model, holders[0], tower)
    try:
        layers = encoder.layers
    except AttributeError:
        yield f"has no layers at {tower.layers!r} of its {type(encoder.module).__name__}"
        return
    if not isinstance(layers, nn.ModuleList):
        yield f"its layers at {tower.layers!r} are a {type(layers).__name__}"
        return
    for layer in layers:
        yield from problems_of_layer(tower, layer)
    yield from problems_of_facts(tower, encoder, layers)


def problems_of_layer(tower: Tower, layer: nn.Module) -> Iterator[str]:
    layout, name = tower.layout, type(layer).__name__
    known = {layout.attention, layout.norm_before, layout.norm_after, "mlp", *layout.after_attention}
    known |= {*layout.after_mlp} | ({layout.pair_bias} if layout.pair_bias else set())
    yield from (f"{name} has no {part}" for part in sorted(known) if not hasattr(layer, part))
    yield from (f"{name} has {part}, which the layout does not know" for part in unknown_parts(layer, known))
    attention = getattr(layer, layout.attention, None)
    if attention is None:
        return
    name = type(attention).__name__
    projections = {"q_proj", "k_proj", "v_proj", layout.o_proj}
    wanted = projections | {"head_dim", "config", layout.scaling, layout.attention_dropout}
    yield from (f"{name} has no {part}" for part in sorted(wanted) if not hasattr(attention, part))
    yield from (f"{name} has {part}, which nobody here runs" for part in unknown_parts(attention, projections))
    module = type(attention).__module__
    if not hasattr(sys.modules[module], "eager_attention_forward"):
        yield f"{module} has no eager_attention_forward"


def unknown_parts(module: nn.Module, known: set[str]) -> list[str]:
    own = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
    return sorted(set(own) - known)


def problems_of_facts(tower: Tower, encoder: Encoder, layers: nn.ModuleList) -> Iterator[str]:
    facts = facts_of(encoder.model.config)
    attention, layer = getattr(layers[0], tower.layout.attention, None), layers[0]
    found: dict[str, int] = {"num_hidden_layers": len(layers)}
    if hasattr(attention, "q_proj") and hasattr(attention, "head_dim"):
        found["hidden_size"] = attention.q_proj.in_features
        found["num_attention_heads"] = attention.q_proj.out_features // attention.head_dim
    if hasattr(layer, "mlp"):
        found["mlp_products"] = sum(part.weight.numel() for part in layer.mlp.modules() if isinstance(part, nn.Linear))
    called: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: called.update(kwargs), with_kwargs=True, prepend=True
    )
    shape = tower.inputs(encoder.config)
    with torch.no_grad():
        try:
            found["num_tokens"] = encoder.embed(torch.zeros(1, *shape)).shape[1]
        except Exception as error:
            yield f"inputs of shape {shape} do not reach its first layer: {error!r}"
        if len(shape) == 3:
            yield from problems_of_size(encoder, shape)
    handle.remove()
    for name, value in found.items():
        if getattr(facts, name) != value:
            yield f"its {name} is {value}, and {getattr(facts, name)} by its configuration"
    wanted = ["position_embeddings"] if tower.layout.rotary else []
    wanted += ["resolution", "interpolate_pos_encoding"] if tower.layout.pair_bias else []
    yield from (f"its layers are not told {name}" for name in wanted if name not in called)
    if not isinstance(next(encoder.module.embeddings.modules(), None), nn.Module):
        yield "its embeddings are no module"
    try:
        _ = encoder.patch_projection
    except StopIteration:
        yield "its embeddings have no convolution of patches"


def problems_of_size(encoder: Encoder, shape: tuple[int, ...]) -> Iterator[str]:
    """Images of another size, with what the encoder says that a forward must be told of them."""
    height, width = shape[1] + encoder.patch_size[0], shape[2] + 2 * encoder.patch_size[1]
    images = torch.zeros(1, shape[0], height, width)
    expected = encoder.facts.num_prefix_tokens
    expected += (height // encoder.patch_size[0]) * (width // encoder.patch_size[1])
    try:
        count = encoder.embed(images, **encoder.size_arguments(images)).shape[1]
    except Exception as error:
        yield f"images of {height}x{width} do not reach its first layer: {error!r}"
        return
    if count != expected:
        yield f"of an image of {height}x{width} it makes {count} tokens, not {expected}"


def main() -> int:
    transformers.logging.set_verbosity_error()  # what it says of tiny configurations is not to the point
    changed = scan()
    if changed:
        print(f"\nIn transformers {transformers.__version__} this is not as the table of encoders says:")
        classes: dict[str, list[str]] = {}
        for name, problem in (line.split(": ", 1) for line in changed):
            classes.setdefault(problem, []).append(name)
        for problem, names in classes.items():
            print(f"  {problem} (seen in {', '.join(names)})")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
