"""Losses of distillation, as functions of logits and tokens.

B images · N patch tokens · D features · C classes
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Measure how far the student's probabilities are from the teacher's.

    The loss is the Kullback-Leibler divergence, times the squared temperature, so that the gradients do not shrink
    when the temperature grows.

    Args:
        student_logits: Logits of the student, (B, C).
        teacher_logits: Logits of the teacher, (B, C).
        temperature: Both logits are divided by it before the softmax.

    Returns:
        The mean over the images, a scalar.

    Example:
        >>> loss = distillation_loss(student(pixels).logits, teacher(pixels).logits, temperature=2.0)
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(student_tokens: Sequence[Tensor], teacher_tokens: Sequence[Tensor]) -> Tensor:
    """Measure how far a student's tokens are from its teacher's, by the mean squared error.

    Args:
        student_tokens: Tokens of the student, one tensor (B, N, D) for each layer. A student that was slimmed by SiT
            has fewer tokens; `restore_hidden_states` makes it return all of them.
        teacher_tokens: Tokens of the teacher, with the same shapes.

    Returns:
        The mean over the layers, a scalar.
    """
    distances = [
        F.mse_loss(student.float(), teacher.float())
        for student, teacher in zip(student_tokens, teacher_tokens, strict=True)
    ]
    return torch.stack(distances).mean()
