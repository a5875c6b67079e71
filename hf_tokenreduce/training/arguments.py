"""The training arguments of `TokenReduceTrainer`: those of transformers, and a few more."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class TokenReduceTrainingArguments(TrainingArguments):
    """Hold the arguments of `TokenReduceTrainer`: all of `TrainingArguments`, and those that token reduction adds.

    `recipe` gives values for each method. Every loss that is added to the task loss has a weight here.

    Args:
        freeze_backbone: Train only the learned parts of the method, such as LTMP's thresholds.
        merge_learning_rate: Learning rate of LTMP's merge thresholds. None: `learning_rate`.
        prune_learning_rate: Learning rate of LTMP's prune thresholds. None: `learning_rate`.
        reverse_learning_rate_factor: Learning rate of SiT's token decoder, as a multiple of `learning_rate`.
        logits_weight: Weight of the distillation of the teacher's logits. 0 leaves it out.
        distillation_temperature: Temperature of the distillation of logits.
        token_weight: Weight of the distillation of the teacher's tokens, which is for SiT. 0 leaves it out.
        keep_rate_warmup: Share of the training steps, from 0 to 1, in which the keep rate falls from 1 to its value.

    Example:
        >>> args = TokenReduceTrainingArguments("out", **recipe("tome"), remove_unused_columns=False)
    """

    freeze_backbone: bool = field(default=False, metadata={"help": "Train only the learned parts of the method."})
    merge_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of LTMP's merge thresholds. Default: learning_rate."}
    )
    prune_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of LTMP's prune thresholds. Default: learning_rate."}
    )
    reverse_learning_rate_factor: float = field(
        default=5.0, metadata={"help": "Learning rate of SiT's token decoder, as a multiple of learning_rate."}
    )
    logits_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distillation of the teacher's logits. 0 leaves it out."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the distillation of logits."}
    )
    token_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the distillation of the teacher's tokens, for SiT. 0 leaves it out."},
    )
    keep_rate_warmup: float = field(
        default=0.0, metadata={"help": "Share of the steps in which the keep rate falls from 1 to its value."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("logits_weight", "token_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (0 leaves the loss out), got {getattr(self, name)}.")
        for name in ("distillation_temperature", "reverse_learning_rate_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.keep_rate_warmup <= 1:
            raise ValueError(
                f"keep_rate_warmup must be a share of the steps, from 0 to 1, got {self.keep_rate_warmup}."
            )
