"""The models that are checked and timed on a CUDA device, and the sizes and batches in which they are."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
    reduce_tokens,
)


DEIT_T = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SIZES: dict[str, dict[str, Any]] = {
    "deit-s": DEIT_S, "deit-t": DEIT_T, "vit-b": {}, "deit-s-384": {**DEIT_S, "image_size": 384},
}  # fmt: skip
TINY = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64}
EVEN = {
    "tome": lambda: ToMeConfig(r=13),
    "topk": lambda: TopKConfig(keep_rate=0.7),
    "evit": lambda: EViTConfig(keep_rate=0.7),
    "bat": lambda: BATConfig(keep_rate=0.7),
    "sit": lambda: SiTConfig(),
    "dlvit-even": lambda: DLViTConfig(keep_rate=0.65, trained=True),
}
PACKED: dict[str, Any] = {
    "ats": lambda: ATSConfig(),
    "ltmp": lambda: LTMPConfig(merge_threshold=0.9, prune_threshold=0.004),
    "dlvit": lambda: DLViTConfig(threshold=0.5, trained=True),
}
# Only checked: without pruning nothing is received, so packed images attend one by one in float32.
CHECKED = {"ltmp-merging": lambda: LTMPConfig(merge_threshold=0.9, prune=False)}
# They come after the others, whose results are to be there if the time ends.
NEWER = ("protected", "pitome", "diffrate", "ppt", "mctf", "shift", "dtem")
# What is timed, the most telling first, because the time may end before all is done.
CELLS = [
    ("deit-s", 256), ("deit-t", 1), ("vit-b", 256), ("deit-s", 1), ("deit-s", 32), ("deit-s-384", 256),
    ("deit-t", 256), ("vit-b", 1), ("vit-b", 32), ("deit-t", 32), ("deit-s-384", 32), ("deit-s-384", 1),
]  # fmt: skip
COMPILED_CELLS = [("deit-s", 256)]
BLOCKS = (128, 32), (128, 64), (64, 32), (64, 64), (64, 128)  # of our kernel; it has the first
COMPILED = ("tome", "bat", "evit", "sit")

Task = tuple[str, Callable[[], Any]]


class Bench:
    """Hold the device, and make the models and images for it."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        # On CPUs bfloat16 rounds so differently from processor to processor that near ties fall otherwise.
        self.half = torch.float16 if smoke else torch.bfloat16
        self.cells = [("tiny", 3)] if smoke else CELLS
        self.compiled_cells = [("tiny", 3)] if smoke else COMPILED_CELLS
        self.compiled_names = ("tome",) if smoke else COMPILED
        self.repeats = 2 if smoke else 15
        self.sizes = {"tiny": TINY} if smoke else SIZES

    def stock(self, size: str) -> ViTForImageClassification:
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**self.sizes[size], num_labels=100))
        with torch.no_grad():  # larger weights than the initial ones, so that decisions have margins
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3.0 if "position" not in name else 20.0)
        return model.eval()

    def reduced(self, stock: Any, name: str) -> Any:
        if name == "dense":
            return stock
        torch.manual_seed(1)
        if name in NEWER:
            return reduce_tokens(stock, name, share=0.65).eval()
        setting = {**EVEN, **PACKED, **CHECKED}[name]()
        return reduce_tokens(stock, setting).eval()

    def images(self, size: str, count: int) -> torch.Tensor:
        side = self.sizes[size].get("image_size", 224)
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))

    @property
    def smallest(self) -> str:
        return "tiny" if self.smoke else "deit-t"


def moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a copy on the device. Models share weights, so `.to` would move those of all of them."""
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval()


def distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, divided by the largest expected value."""
    values, expected = values.float().cpu(), expected.float().cpu()
    return ((values - expected).abs().max() / expected.abs().max()).item()
