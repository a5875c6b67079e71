"""Losses for each kind of head: one class, several labels, numbers."""

import pytest
import torch
from torch.nn import functional as F

from hf_tokenreduce.training import distillation_loss


KINDS = ["single_label_classification", "multi_label_classification", "regression", None]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("kind", "outputs"), [(kind, 4) for kind in KINDS] + [("regression", 1), (None, 1)])
def test_a_student_is_at_its_best_where_it_is_like_its_teacher(kind, outputs, temperature):
    """A softmax over one number would always be 1, and teach nothing."""
    teacher = torch.randn(6, outputs)
    student = teacher.clone().requires_grad_()
    assert distillation_loss(student, teacher, temperature, kind).item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature, kind), student)
    assert gradient.abs().max() < 1e-6
    other = torch.randn(6, outputs, requires_grad=True)
    loss = distillation_loss(other, teacher, temperature, kind)
    (gradient,) = torch.autograd.grad(loss, other)
    assert loss > 0.01 and (gradient.abs() > 0).all()


def test_each_label_of_several_has_a_probability_of_its_own():
    """The mean of the divergences of all classes, each between yes and no, by its definition."""
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    expected = []
    for ours, theirs in zip(student.flatten(), teacher.flatten(), strict=True):
        p, q = (torch.stack([logit.sigmoid(), 1 - logit.sigmoid()]) for logit in (theirs, ours))
        expected.append((p * (p / q).log()).sum())
    loss = distillation_loss(student, teacher, problem_type="multi_label_classification")
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    numbers = distillation_loss(student, teacher, problem_type="regression")
    torch.testing.assert_close(numbers, F.mse_loss(student, teacher))
