"""Learning rates of their own for thresholds, for SiT's token decoder and for the networks of a method."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .arguments import TokenReduceTrainingArguments


REVERSE = "reverse_slimming"  # attribute of the model that holds the token decoder during training; prefix of its keys


def split_groups(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], args: TokenReduceTrainingArguments
) -> None:
    """Give parameters with a learning rate of their own a group of their own, in place.

    In a group they keep the order of `named`, because a checkpoint knows them by their place.

    Args:
        optimizer: The optimizer of `Trainer`, with every parameter that learns.
        named: Names and parameters of the model.
        args: The training arguments.

    Raises:
        ValueError: The method has no networks of its own, but `args` has a learning rate for them.
    """
    rates = {
        "merge_threshold": args.merge_learning_rate,
        "prune_threshold": args.prune_learning_rate,
        REVERSE: args.learning_rate * args.reverse_learning_rate_factor,
        "reducer": None,
    }
    if args.reducer_learning_rate_factor != 1:
        rates["reducer"] = args.learning_rate * args.reducer_learning_rate_factor
    usual = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    own: dict[tuple[str, float], list[Any]] = defaultdict(list)
    for name, parameter in named:
        part = next((part for part in rates if part in name.split(".")), None)  # a threshold is also in a reducer
        if part is not None and rates[part] is not None and id(parameter) in usual:
            decays = {REVERSE: args.weight_decay, "reducer": usual[id(parameter)]}
            own[part, decays.get(part, 0.0)].append(parameter)
    if rates["reducer"] is not None and not any(part == "reducer" for part, _ in own):
        raise ValueError(
            "reducer_learning_rate_factor is for the networks of a method, such as those of SiT, but this model has "
            f"none that learn. Set it to 1, got {args.reducer_learning_rate_factor}."
        )
    moved = {id(parameter) for parameters in own.values() for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    for (part, decay), parameters in own.items():
        optimizer.add_param_group({"params": parameters, "lr": rates[part], "weight_decay": decay})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
