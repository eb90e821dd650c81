"""What the dense model gives on windows that nothing is trained on, to hold others against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from dyncomp.evaluate import model_inputs
from dyncomp.examples import row_tokens
from dyncomp.graph import Graph
from dyncomp.heal.losses import output_loss
from dyncomp.heal.program import Program
from dyncomp.rows import Rows, split_rows

_LOOK = 512
"""Tokens that are computed at once."""


class HeldOut:
    """Parts of held-out windows, and the dense model's states on them, computed when first needed.

    Args:
        teacher: runs the dense model.
        task: of the model, what the loss is (:func:`~dyncomp.heal.losses.output_loss`).
    """

    def __init__(self, teacher: Program, parts: Sequence[Rows], task: str) -> None:
        self._teacher, self._parts, self._task = teacher, parts, task
        self._wanted: list[Tensor] = []

    @torch.no_grad()
    def total(self, student: Program, change: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None) -> float:
        """The sum of the windows' losses, without the terms that only guide training.

        Args:
            change: what becomes of nodes' values, as training does it; by default they are what the graph gives.
        """
        self._wanted = self._wanted or [self._teacher(model_inputs(self._teacher.graph, ids))[0] for ids in self._parts]
        total = torch.zeros(1, dtype=torch.float64)
        for ids, wanted in zip(self._parts, self._wanted, strict=True):
            output, _ = student(model_inputs(student.graph, ids), (), change)
            total += output_loss(output, wanted, self._task, student.finish, self._teacher.finish).double() * len(ids)
        return float(total)


def pieces(graph: Graph, windows: Rows) -> list[Rows]:
    """The windows as they are computed, a few at once."""
    return split_rows(windows, max(1, _LOOK // row_tokens(graph, windows)))
