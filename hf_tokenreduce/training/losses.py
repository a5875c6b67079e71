"""Losses, as functions of what models return.

B images · N patch tokens · D features · C classes
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the student's probabilities (B, C) are from the teacher's: their divergence, times the squared
    temperature, so that gradients do not shrink with it. Mean over images."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(student_tokens: Sequence[Tensor], teacher_tokens: Sequence[Tensor]) -> Tensor:
    """How far a student's tokens are from its teacher's: mean over layers of the mean squared error.

    student_tokens, teacher_tokens: by layer, (B, N, D). A slimmed student's come from `restore_hidden_states`.
    """
    distances = [
        F.mse_loss(student.float(), teacher.float())
        for student, teacher in zip(student_tokens, teacher_tokens, strict=True)
    ]
    return torch.stack(distances).mean()
