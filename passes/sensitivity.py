"""How much the model's output depends on each input of its linear layers, from a few backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.mapped import trim
from dyncomp.models.loaded import WRITES

_KEPT = 256  # tokens of a batch whose inputs are kept


class Sensitivity:
    """Of the inputs [tokens, K] that some nodes give to linear layers.

    ``fisher[node]`` [K] is the mean of ``(d loss / d x_j)^2`` over tokens, with labels drawn from the model's own distribution (causal
    language models: half of ``fisher * x^2`` is then the KL divergence, to second order, that leaving ``x_j`` out costs) or the loss
    being a random projection of the outputs (others: the squared error). ``inputs[node]`` [n, K] are some of the tokens, float16.

    Args:
        graph: whose weights need no gradient; runs once forward and once backward for each batch.
        linears: node of a linear layer -> node of its input.
        seed: of the labels and projections.
    """

    def __init__(self, graph: Graph, linears: dict[fx.Node, fx.Node], *, seed: int = 0) -> None:
        self.graph, self._linears = graph, linears
        self._random = torch.Generator().manual_seed(seed)
        self._sums: dict[fx.Node, Tensor] = {}
        self._tokens: dict[fx.Node, int] = {}
        self._inputs: dict[fx.Node, list[Tensor]] = {}

    def add(self, batch: dict[str, Tensor]) -> None:
        """Take one batch of graph inputs into account."""
        values = [batch[spec.name] for spec in self.graph.inputs]
        with torch.enable_grad():
            output = _Recorder(self).run(*values)[0]
            output.backward(self._cotangent(output.detach()))

    @property
    def fisher(self) -> dict[fx.Node, Tensor]:
        return {node: (total / self._tokens[node]).float() for node, total in self._sums.items()}

    @property
    def inputs(self) -> dict[fx.Node, Tensor]:
        return {node: torch.cat(parts) for node, parts in self._inputs.items()}

    def _cotangent(self, output: Tensor) -> Tensor:
        if self.graph.info.get("task") not in WRITES:
            return torch.randn(output.shape, generator=self._random)
        p = torch.softmax(output.float(), -1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=self._random)
        p.view(-1, p.shape[-1]).scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
        return p

    def _see(self, node: fx.Node, x: Tensor) -> Callable[[Tensor], None]:
        rows = x.detach().reshape(-1, x.shape[-1])
        chosen = torch.randperm(len(rows), generator=self._random)[:_KEPT]
        self._inputs.setdefault(node, []).append(rows[chosen].half())

        def note(gradient: Tensor) -> None:
            total = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
            self._sums[node] = self._sums[node] + total if node in self._sums else total
            self._tokens[node] = self._tokens.get(node, 0) + len(rows)
            trim()

        return note


class _Recorder(fx.Interpreter):
    """Runs the graph; linear layers that share an input read a copy of it whose gradient is looked at."""

    def __init__(self, owner: Sensitivity) -> None:
        super().__init__(owner.graph.module)
        self.extra_traceback = False
        self._owner, self._read = owner, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        trim()
        source = self._owner._linears.get(n)
        if source is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if source not in self._read:
            x: Tensor = self.env[source]
            alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            alias.register_hook(self._owner._see(source, x))
            self._read[source] = alias
        at = next(i for i, a in enumerate(n.args) if a is source)
        return n.target(*args[:at], self._read[source], *args[at + 1 :], **kwargs)  # type: ignore[operator]


def sensitivity(graph: Graph, linears: dict[fx.Node, fx.Node], batches: Sequence[dict[str, Tensor]], *, seed: int = 0) -> Sensitivity:
    """:class:`Sensitivity` over some batches."""
    found = Sensitivity(graph, linears, seed=seed)
    for batch in batches:
        found.add(batch)
    return found
