"""How each method is trained: its authors' way, and a short one for small data sets.

The values are arguments of `TokenReduceTrainingArguments`; what is not named keeps its default. `AUGMENTATION` has
arguments of `TrainTransform` and `Collator`: the papers' fine-tunes use the strong one.
"""

from typing import Any


# After EViT's fine-tunes of DeiT, which BAT's logs follow: the rate is for a batch of 512.
FINE_TUNE = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 512,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "weight_decay": 1e-6,
    "optim": "adamw_torch",
}
QUICK_FINE_TUNE = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "optim": "adamw_torch",
}
THRESHOLDS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 128,
    "freeze_backbone": True,
    "merge_learning_rate": 5e-3,
    "prune_learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "label_smoothing_factor": 0.1,
    "optim": "sgd",
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "tome": {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE},
    "topk": {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE},
    "evit": {"paper": {**FINE_TUNE, "keep_rate_warmup": 0.3}, "quick": QUICK_FINE_TUNE},
    "bat": {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE},
    "ats": {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE},
    "dlvit": {"paper": FINE_TUNE, "quick": QUICK_FINE_TUNE},
    # A small data set has few steps in its one epoch: smaller batches, and prune thresholds that move within them.
    "ltmp": {
        "paper": THRESHOLDS,
        "quick": {**THRESHOLDS, "per_device_train_batch_size": 32, "prune_learning_rate": 2e-6},
    },
    "sit": {
        "paper": {
            "num_train_epochs": 135,
            "per_device_train_batch_size": 1024,
            "learning_rate": 4e-4,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-5},
            "weight_decay": 0.05,
            "optim": "adamw_torch",
            "reverse_learning_rate_factor": 5.0,
            "logits_weight": 2.0,
            "token_weight": 2.0,
        },
        # Its networks learn more than a backbone has to: twice the epochs of the others.
        "quick": {
            **QUICK_FINE_TUNE,
            "num_train_epochs": 6,
            "learning_rate": 1e-4,
            "logits_weight": 2.0,
            "token_weight": 2.0,
        },
    },
}

AUGMENTATION: dict[str, dict[str, Any]] = {
    "none": {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3), "flip": 0.0},
    "light": {"scale": (0.5, 1.0)},
    "strong": {"scale": (0.08, 1.0), "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
}


def recipe(method: str, variant: str = "quick") -> dict[str, Any]:
    """Arguments of `TokenReduceTrainingArguments` for a method: "paper", as its authors trained, or "quick", for small
    data sets. `TokenReduceTrainingArguments("out", **{**recipe("bat"), "num_train_epochs": 5})` changes one.
    """
    if method not in RECIPES:
        raise ValueError(f"There is no recipe for {method!r}. The methods are: {', '.join(RECIPES)}.")
    if variant not in RECIPES[method]:
        raise ValueError(f"A recipe's variant is {' or '.join(RECIPES[method])}, got {variant!r}.")
    return dict(RECIPES[method][variant])
