"""Training of reduced models: `TokenReduceTrainer`, losses, augmentation, and the extra steps of single methods."""

from ..methods.token_decoder import ReverseSlimming, restore_hidden_states, reverse_modules
from .arguments import TokenReduceTrainingArguments
from .augmentation import BatchTransform, Collator, EvalTransform, TrainTransform, readable_rows
from .filter import fit_filter
from .labels import make_labels
from .losses import distillation_loss, token_loss
from .recipes import recipe
from .trainer import TokenReduceTrainer


__all__ = [
    "BatchTransform",
    "Collator",
    "EvalTransform",
    "ReverseSlimming",
    "TokenReduceTrainer",
    "TokenReduceTrainingArguments",
    "TrainTransform",
    "distillation_loss",
    "fit_filter",
    "make_labels",
    "readable_rows",
    "recipe",
    "restore_hidden_states",
    "reverse_modules",
    "token_loss",
]
