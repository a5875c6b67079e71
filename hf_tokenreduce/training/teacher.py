"""The teacher of a distillation: which model it is, and whether it fits the model that learns."""

import copy
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..convert import restored
from ..modeling.encoders import encoder_config, facts_of
from .arguments import TokenReduceTrainingArguments


def teacher_of(
    model: PreTrainedModel, args: TokenReduceTrainingArguments, given: PreTrainedModel | str | Path | None
) -> PreTrainedModel | None:
    """Return the frozen teacher of a training, or None if nothing is distilled.

    Args:
        model: The reduced model that learns.
        args: The training arguments.
        given: A model, a folder or a Hub id. None: the model as it is now, without its reduction.

    Returns:
        The teacher in eval mode, with weights of its own.
    """
    if not (args.logits_weight or args.token_weight):
        if given is not None:
            raise ValueError(
                "A teacher_model would teach nothing without logits_weight or token_weight. Set one of them."
            )
        return None
    if given is None:
        teacher = copy.deepcopy(restored(model))
    elif isinstance(given, (str, Path)):
        teacher = AutoModelForImageClassification.from_pretrained(given)
    else:
        own = {id(parameter) for parameter in model.parameters()}
        # `reduce_tokens` shares the weights of its model: frozen as a teacher, they would not learn here either.
        shares = any(id(parameter) in own for parameter in given.parameters())
        teacher = copy.deepcopy(given) if shares else given
    if args.token_weight and getattr(teacher.config, "reduction", None) is not None:
        raise ValueError(f"A teacher of tokens must be dense, but this one is reduced by {teacher.config.reduction}.")
    model_traits, teacher_traits = (
        _what_is_taught(config, bool(args.token_weight)) for config in (model.config, teacher.config)
    )
    if None in (model_traits["classes"], teacher_traits["classes"]):  # one of them has no names for its classes
        model_traits["classes"] = teacher_traits["classes"] = None
    for name, value in model_traits.items():
        if teacher_traits[name] != value:
            raise ValueError(
                f"The teacher's {name} is {teacher_traits[name]}, the model's {value}. They must be equal for this "
                "distillation. Use another teacher, or give none: then the dense model is the teacher."
            )
    return teacher.eval().requires_grad_(False)


def _what_is_taught(config: PreTrainedConfig, tokens: bool) -> dict[str, Any]:
    """Return what the teacher and the model must have in common. tokens: whether tokens are distilled."""
    unnamed = PreTrainedConfig(num_labels=config.num_labels).label2id
    encoder = encoder_config(config)
    taught = {"num_labels": config.num_labels, "image_size": getattr(encoder, "image_size", None)}
    taught["classes"] = None if config.label2id == unnamed else config.label2id
    if tokens:
        taught |= {name: getattr(encoder, name) for name in ("patch_size", "hidden_size", "num_hidden_layers")}
        taught["prefix tokens"] = facts_of(config).num_prefix_tokens
    return taught
