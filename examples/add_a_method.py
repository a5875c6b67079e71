"""Add your own method: random pruning, as a baseline. This file is saved with every model that uses the method.

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
    """Keep random patch tokens, at the same positions in every image. Needs no training.

    Args:
        keep_rate: Share of the patch tokens that each of `layers` keeps, rounded up.
        layers: Layers that drop tokens between their attention and their MLP, counted from 0.
        seed: Seed of the random positions.
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
        return  # the package is not there when a published folder is loaded, and nothing has to be registered
    summary = "In some layers, random patch tokens are dropped. This baseline shows how much scores help."
    described = Method(RandomConfig, "Random", "pruning", summary, at_share=by_keep_rate(RandomConfig, 3, 6, 9))
    register_method(RandomConfig, RandomReducer, described)


def main(arguments: list[str] | None = None) -> None:
    try:
        import argparse

        from hf_tokenreduce import reduce_tokens
        from hf_tokenreduce.loading import load_model
    except ImportError:
        raise
    parser = argparse.ArgumentParser(description="Save a model that uses the method of this file.")
    parser.add_argument("model_name_or_path", help="Folder or Hub id of the model.")
    parser.add_argument("--share", type=float, default=0.65, help="Share of the multiply-adds to keep.")
    parser.add_argument("--output_dir", default="random", help="Folder for the reduced model.")
    args = parser.parse_args(arguments)
    model, processor = load_model(args.model_name_or_path)
    reduce_tokens(model, "random", share=args.share).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    register()
    main()
