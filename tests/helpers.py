"""Tiny models, and the rows of the test matrix: a new method or backbone is one more row."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DiffRateConfig,
    DLViTConfig,
    DTEMConfig,
    EViTConfig,
    LTMPConfig,
    MCTFConfig,
    PiToMeConfig,
    PPTConfig,
    ProtectedConfig,
    ShiftConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
    reduce_tokens,
)
from hf_tokenreduce.methods import METHODS as DESCRIBED


SHARED = Path(os.environ.get("TOKENREDUCE_SHARED", Path(__file__).resolve().parents[2] / "shared"))

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}
NUM_PATCHES = 64

BACKBONES = {
    "vit": (ViTForImageClassification, ViTConfig),
    "deit": (DeiTForImageClassification, DeiTConfig),
    "deit-teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig),
}
BASES = {"vit": (ViTModel, ViTConfig), "deit": (DeiTModel, DeiTConfig)}

# name -> (setting that reduces, setting that reduces nothing)
METHODS = {
    "tome": (ToMeConfig(r=7), ToMeConfig(r=0)),
    "tome-no-prop": (ToMeConfig(r=[9, 0, 5, 40], prop_attn=False), ToMeConfig(r=(0, -1.0), prop_attn=False)),
    "tome-decreasing": (ToMeConfig(r=(8, -1.0)), ToMeConfig(r=[0, 0, 0, 0])),
    "evit": (EViTConfig(keep_rate=0.6, layers=(0, 2)), EViTConfig(keep_rate=1.0, layers=(0, 2))),
    "evit-no-fuse": (EViTConfig(keep_rate=[0.9, 0.3], layers=(1, 2), fuse=False), EViTConfig(layers=())),
    "topk": (TopKConfig(keep_rate=0.5, layers=(1, 3)), TopKConfig(keep_rate=[1.0], layers=[2])),
    "bat": (BATConfig(keep_rate=0.6, layers=(0, 2)), BATConfig(keep_rate=1.0, layers=(0, 2))),
    "bat-clusters": (
        BATConfig(keep_rate=[0.8, 0.3], layers=(3, 1), cluster_share=1.0, prop_attn=True),
        BATConfig(keep_rate=1, layers=(1,), prop_attn=True),
    ),
    "bat-pairs": (BATConfig(keep_rate=0.7, layers=(1, 2), cluster_share=0.0, fuse_share=1.0), BATConfig(layers=())),
    "sit": (SiTConfig(layers=(0, 2)), SiTConfig(keep_rate=1.0, layers=(0, 2))),
    "sit-list": (SiTConfig(keep_rate=[0.8, 1.0, 0.2], layers=(1, 2, 3)), SiTConfig(layers=())),
    "dlvit-share": (DLViTConfig(keep_rate=0.6, trained=True), DLViTConfig(keep_rate=1.0, trained=True)),
    "dlvit": (DLViTConfig(threshold=0.08, trained=True), DLViTConfig()),
    "dlvit-capped": (
        DLViTConfig(threshold=0.3, hidden_size=10, max_tokens=25, trained=True),
        DLViTConfig(threshold=0.0, max_tokens=66, trained=True),
    ),
    "ats": (ATSConfig(layers=(1, 2, 3)), ATSConfig(layers=())),
    "ats-per-head": (ATSConfig(layers=(0, 2), num_tokens=40, score="per_head"), ATSConfig(layers=())),
    "ats-capped": (ATSConfig(layers=(0, 2), max_tokens=[30, 12]), ATSConfig(layers=(), max_tokens=5)),
    "ltmp": (LTMPConfig(merge_threshold=0.5, prune_threshold=0.009), LTMPConfig(merge_threshold=1.0)),
    "ltmp-merge": (LTMPConfig(merge_threshold=0.4, prune=False), LTMPConfig(merge_threshold=1.0, prune=False)),
    "ltmp-prune": (LTMPConfig(prune_threshold=0.011, merge=False), LTMPConfig(merge=False)),
    "ltmp-capped": (
        LTMPConfig(merge_threshold=0.6, prune_threshold=0.004, max_tokens=[60, 45, 30, 20]),
        LTMPConfig(merge_threshold=1.0, max_tokens=66),
    ),
    "pitome": (PiToMeConfig(r=[7, 0, 5, 0]), PiToMeConfig(r=0)),
    "diffrate": (DiffRateConfig(r=8, prune_share=[0.2, 0.0, 1.0, 0.5]), DiffRateConfig(r=(0, -1.0), prune_share=1)),
    "ppt": (PPTConfig(r=15, layers=(0, 2), threshold=4e-4), PPTConfig(r=0, layers=(1,))),
    "mctf": (MCTFConfig(r=7), MCTFConfig(r=0)),
    "dtem": (DTEMConfig(r=7, embedding_size=20), DTEMConfig(r=0)),
    "shift": (ShiftConfig(keep_rate=[0.6, 0.5], layers=(0, 2)), ShiftConfig(keep_rate=1.0, layers=(0, 2))),
    "protected": (ProtectedConfig(keep_rate=[0.75, 0.4], layers=(0, 2)), ProtectedConfig(keep_rate=1.0, layers=(1,))),
}
# Methods that are made of parts which others here hold everywhere, and the one backbone in which each is held.
NEWER = {
    "pitome": "deit",
    "diffrate": "vit",
    "ppt": "deit-teacher",
    "mctf": "vit",
    "dtem": "deit",
    "shift": "vit",
    "protected": "deit",
}
ADAPTIVE = [name for name in METHODS if name.startswith(("ats", "ltmp")) or name in ("dlvit", "dlvit-capped")]
# The row of each method that the package has: a new one must have a row of its name.
ONE_OF_EACH = [name for name in DESCRIBED if METHODS[name]]
EVEN = [name for name in METHODS if name not in ADAPTIVE]


def slow(*values):
    """Make a case that runs with the slow tests alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def _is_slow(backbone: str, name: str) -> bool:
    """A method runs on two backbones, its variants on one. On "deit", which has the encoder of "deit-teacher", they
    run with the slow tests.
    """
    if name in NEWER:
        return False
    return backbone == "deit" or (name not in ONE_OF_EACH and backbone != VARIANTS_ON[name])


VARIANTS_ON = {
    name: ("vit", "deit-teacher")[place % 2]
    for place, name in enumerate(name for name in METHODS if name not in (*ONE_OF_EACH, *NEWER))
}
EVERY_CASE = [
    slow(backbone, name) if _is_slow(backbone, name) else (backbone, name)
    for name in METHODS
    for backbone in BACKBONES
    if NEWER.get(name, backbone) == backbone
]


def tiny_model(backbone: str = "vit", classes=BACKBONES, **changes):
    """A stock model with weights large enough that every token matters and decisions have margins."""
    model_class, config_class = classes[backbone]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "position" in name or "token" in name else 0.2
            parameter.copy_((parameter.ndim == 1 and name.endswith("weight")) + spread * torch.randn_like(parameter))
    return model.eval()


def reduce_tiny(stock, setting):
    """Reduced, with learned parts of a method as large as the weights of `tiny_model`; thresholds stay as set."""
    model = reduce_tokens(stock, setting)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reducer." in name and "threshold" not in name:
                center = float(name.endswith(("norm.weight", "scale")))
                parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(tmp_path, backbone="vit", method="tome"):
    """A reduced model, and the folder that it was saved in with its processor."""
    model = reduce_tokens(tiny_model(backbone), METHODS[method][0])
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model, folder


def save_cat_and_dog(folder):
    """Save a tiny model that knows two classes, and its image processor."""
    model = tiny_model(num_labels=2)
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def tiny_images(count: int = 3, size: int = 32, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def enable_checkpointing(model, arguments: dict) -> None:
    """By the name this version of transformers has for it: the older one is deprecated in the newer ones."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
