"""What healing minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncomp.models.loaded import WRITES

Finish = Callable[[Tensor], Tensor]
"""States of the last layer [n, d] -> logits [n, V]."""

_ROWS = 128
"""Tokens at a time: with a vocabulary of 50 000, predictions of all tokens of a batch would be most of the memory of a step."""


class _Divergence(torch.autograd.Function):
    """The gradient, softmax(student) - softmax(teacher), is found with the loss, and led back to the states in the same breath."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, finish: Finish, finish_teacher: Finish) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros((), dtype=torch.float64)
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            state = student[rows].detach().requires_grad_(grad is not None)
            with torch.set_grad_enabled(grad is not None):
                logits = finish(state)
            log_q = F.log_softmax(logits.detach().float(), -1)
            log_p = F.log_softmax(finish_teacher(teacher[rows]).float(), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if grad is not None:
                (grad[rows],) = torch.autograd.grad(logits, state, log_q.exp_().sub_(p).to(logits.dtype))
        ctx.grad = grad
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grads[0].to(grad.dtype)), None, None, None


def _as_they_are(states: Tensor) -> Tensor:
    return states


def divergence(student: Tensor, teacher: Tensor, finish: Finish = _as_they_are, finish_teacher: Finish = _as_they_are) -> Tensor:
    """Mean KL(teacher || student) per token, in nats.

    Args:
        student, teacher: [..., d], the teacher's without gradient; by default they are logits.
        finish, finish_teacher: make logits of them, a few tokens at a time: [n, d] -> [n, V].
    """
    student, teacher = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    return _Divergence.apply(student, teacher, finish, finish_teacher) / len(student)


def output_loss(student: Tensor, teacher: Tensor, task: str, finish: Finish, finish_teacher: Finish) -> Tensor:
    """What the outputs differ by: the :func:`divergence` of next-token distributions, or the relative squared error of an encoder's
    states."""
    return divergence(student, teacher, finish, finish_teacher) if task in WRITES else relative_square(student, teacher)


def relative_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of ||student - teacher||² / ||teacher||².

    Each token counts alike: where attention sinks are made, the first position's square is a million times that of others, and would be all
    that a mean over tokens sees.
    """
    teacher = teacher.float()
    return ((student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-20)).mean()
