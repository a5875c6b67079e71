"""Losses, as functions of what models return.

B images · N patch tokens · D features · C classes
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the student's probabilities (B, C) are from the teacher's: their divergence, times the squared
    temperature, so that gradients do not shrink with it. Mean over images."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(
    student_tokens: Sequence[Tensor], teacher_tokens: Sequence[Tensor], reverse: Mapping[str, nn.Module]
) -> Tensor:
    """How far a slimmed student's patch tokens are from its teacher's: mean over layers of the mean squared error.

    student_tokens, teacher_tokens: what leaves each layer, (B, K, D) and (B, N, D)
    reverse: by layer, the module that leads slim tokens back to all; layers without one are compared as they are
    """
    distances = []
    for layer, (student, teacher) in enumerate(zip(student_tokens, teacher_tokens, strict=True)):
        if str(layer) in reverse:
            student = reverse[str(layer)](student)
        distances.append(F.mse_loss(student.float(), teacher.float()))
    return torch.stack(distances).mean()
