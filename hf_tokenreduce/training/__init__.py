"""Training: `TokenReduceTrainer`, its losses, and what single methods need beside the models."""

from .arguments import TokenReduceTrainingArguments
from .losses import distillation_loss, token_loss
from .recipes import recipe
from .reverse import ReverseSlimming, reverse_modules
from .trainer import TokenReduceTrainer


__all__ = [
    "ReverseSlimming",
    "TokenReduceTrainer",
    "TokenReduceTrainingArguments",
    "distillation_loss",
    "recipe",
    "reverse_modules",
    "token_loss",
]
