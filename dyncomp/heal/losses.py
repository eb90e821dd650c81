"""What healing minimises."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncomp.models.loaded import WRITES

_ROWS = 32
"""Tokens at a time: with a vocabulary of 50 000, what is computed on them stays in the CPU's caches."""


class _Divergence(torch.autograd.Function):
    """The gradient, softmax(student) - softmax(teacher), is found with the loss and kept in the student's dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros((), dtype=torch.float64)
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = F.log_softmax(student[rows].float(), -1)
            log_p = F.log_softmax(teacher[rows].float(), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if grad is not None:
                grad[rows] = log_q.exp_().sub_(p)
        ctx.grad = grad
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grads[0].to(grad.dtype)), None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) per token, in nats; both logits [..., V], the teacher's without gradient."""
    student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    return _Divergence.apply(student, teacher) / len(student)


def output_loss(student: Tensor, teacher: Tensor, task: str) -> Tensor:
    """What the outputs differ by: the KL divergence of next-token distributions, or the relative squared error of an encoder's states."""
    return divergence(student, teacher) if task in WRITES else relative_square(student, teacher)


def relative_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's mean square."""
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / teacher.square().mean()
