"""Add a method of your own: random pruning, as a baseline. This file travels with every model that runs it.

python examples/add_a_method.py facebook/deit-tiny-patch16-224 --output_dir random
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_tokenreduce.modeling.attention import AttentionView
from hf_tokenreduce.modeling.configuration_base import KeepRateConfig
from hf_tokenreduce.modeling.hooks import Reducer
from hf_tokenreduce.modeling.multiply_adds import rounded_up_share
from hf_tokenreduce.modeling.tokens import TokenState, apply_map
from hf_tokenreduce.modeling.topk import keep_best


@dataclass(frozen=True)
class RandomConfig(KeepRateConfig):
    """Keep patch tokens at random, the same places in every image. Needs no training.

    keep_rate: share of the patch tokens present that each of `layers` keeps, rounded up.
    layers: 0-based layers that drop tokens, between their attention and their MLP.
    seed: Of the places.
    """

    method: ClassVar[str | None] = "random"

    seed: int = 0


class RandomReducer(Reducer):
    def __init__(self, facts, layer: int):
        super().__init__(facts, layer)
        self.keep_rate = facts.reduction.schedule().get(layer, 1.0)
        self.seed = facts.reduction.seed + layer

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        present = state.num_patch_tokens
        count = rounded_up_share(self.keep_rate, present)
        if count == present:
            return state
        scores = torch.rand(present, generator=torch.Generator().manual_seed(self.seed)).to(view.key.device)
        return apply_map(state, keep_best(scores.expand(view.key.shape[0], -1), count))


def register() -> None:
    try:
        from hf_tokenreduce import Method, register_method
        from hf_tokenreduce.methods.method import by_keep_rate
    except ImportError:
        return  # in a published folder nothing has to be registered
    summary = "In some layers patch tokens are dropped at random. A baseline for what scores are worth."
    described = Method(RandomConfig, "Random", "pruning", summary, at_share=by_keep_rate(RandomConfig, 3, 6, 9))
    register_method(RandomConfig, RandomReducer, described)


def main(arguments: list[str] | None = None) -> None:
    try:
        import argparse

        from hf_tokenreduce import reduce_tokens
        from hf_tokenreduce.loading import load_model
    except ImportError:
        raise
    parser = argparse.ArgumentParser(description="Save a model that runs a method of this file.")
    parser.add_argument("model_name_or_path")
    parser.add_argument("--share", type=float, default=0.65)
    parser.add_argument("--output_dir", default="random")
    args = parser.parse_args(arguments)
    model, processor = load_model(args.model_name_or_path)
    reduce_tokens(model, "random", share=args.share).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    register()
    main()
