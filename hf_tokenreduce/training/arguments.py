"""What `TokenReduceTrainer` can be told beyond transformers' own training arguments."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class TokenReduceTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and what only token reduction has. `recipe` gives the values for a method."""

    freeze_backbone: bool = field(default=False, metadata={"help": "Train only the learned parts of the method."})
    merge_learning_rate: float | None = field(default=None, metadata={"help": "Of LTMP's merge thresholds."})
    prune_learning_rate: float | None = field(default=None, metadata={"help": "Of LTMP's prune thresholds."})
    reverse_learning_rate_factor: float = field(
        default=5.0, metadata={"help": "Times learning_rate, of the way back that SiT distills through."}
    )
    logits_weight: float = field(default=0.0, metadata={"help": "Of the distillation of the teacher's logits."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of the distillation of logits."})
    token_weight: float = field(default=0.0, metadata={"help": "Of SiT's distillation of the teacher's tokens."})
    keep_rate_warmup: float = field(
        default=0.0, metadata={"help": "Share of the steps in which the keep rate falls from 1 to its value."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("logits_weight", "token_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (0 leaves it out), got {getattr(self, name)}.")
        for name in ("distillation_temperature", "reverse_learning_rate_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.keep_rate_warmup <= 1:
            raise ValueError(f"keep_rate_warmup is a share of the steps, from 0 to 1, got {self.keep_rate_warmup}.")
