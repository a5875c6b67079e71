"""Losses of the task and of distillation, as functions of logits and tokens.

B images · N patch tokens · D features · C classes
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def task_loss(logits: Tensor, labels: Tensor, config: Any, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss of a model with classes or numbers, of the kind that its `problem_type` says.

    Args:
        logits: Logits of the model, (B, C).
        labels: Class indices (B,), or probabilities (B, C). For several labels per image, 0 or 1 for each class. For
            regression, numbers.
        config: Configuration of the model.
        label_smoothing: Share of the probability that is spread over all classes. It counts for one label per image.

    Returns:
        The mean over the images, a scalar: the loss of the stock model if nothing is smoothed.
    """
    logits = logits.float()
    soft = labels.ndim == 2 and logits.shape[-1] > 1
    if config.problem_type == "multi_label_classification":
        if labels.shape != logits.shape:
            raise ValueError(
                "problem_type is 'multi_label_classification', so labels must be 0 or 1 for each class, of shape "
                f"{tuple(logits.shape)}, got {tuple(labels.shape)}. For one class per image set "
                "model.config.problem_type = 'single_label_classification'."
            )
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    if _are_numbers(config.problem_type, logits):
        return F.mse_loss(logits.flatten(), labels.float().flatten())
    if config.problem_type is None and soft and bool((labels.float().sum(dim=-1) - 1).abs().max() > 0.01):
        raise ValueError(
            "These labels have a number for each class, and those of an image do not add up to 1. If an image may "
            "have several classes, set model.config.problem_type = 'multi_label_classification'."
        )
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, problem_type: str | None = None
) -> Tensor:
    """Measure how far the student's probabilities are from the teacher's.

    The loss is the Kullback-Leibler divergence, times the squared temperature, so that the gradients do not shrink
    when the temperature grows. If an image may have several labels, each class has a probability of its own, and the
    loss is the mean over the classes, as in `task_loss`. Numbers are compared by their squared difference.

    Args:
        student_logits: Logits of the student, (B, C).
        teacher_logits: Logits of the teacher, (B, C).
        temperature: Both logits are divided by it before the softmax. Numbers are not divided.
        problem_type: What the logits are, as in the configuration of the model.

    Returns:
        The mean over the images, a scalar.

    Example:
        >>> loss = distillation_loss(student(pixels).logits, teacher(pixels).logits, temperature=2.0)
    """
    if _are_numbers(problem_type, student_logits):
        return F.mse_loss(student_logits.float(), teacher_logits.float())
    student, teacher = student_logits.float() / temperature, teacher_logits.float() / temperature
    if problem_type == "multi_label_classification":
        apart = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
        at_best = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")
        return (apart - at_best).mean() * temperature**2
    student, teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _are_numbers(problem_type: str | None, logits: Tensor) -> bool:
    return problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1)


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
