"""What is trained: whole weights or low-rank adapters of them, under the names of the graph's constants."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dyncomp.graph import Graph
from dyncomp.regions import find_linears, find_regions, find_routed
from dyncomp.regions.depth import find_skips


class Weights:
    """The constants of a graph as they are during training.

    Matrices of linear layers and of experts are trained whole (``rank`` 0) or as W + B A with A: [rank, in], B: [out, rank]
    (LoRA, 2106.09685); norms, biases and routers always whole; embedding and vocabulary head stay. Weights that share their
    values keep sharing them.
    """

    def __init__(self, graph: Graph, *, rank: int = 0, seed: int = 0) -> None:
        self._graph, self.rank = graph, rank
        self.routers = router_names(graph)
        self.full: dict[str, torch.nn.Parameter] = {}
        self.low: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        self._same: dict[str, str] = {}
        generator = torch.Generator().manual_seed(seed)
        first: dict[int, str] = {}
        matrices, biases = matrix_names(graph), {r.b_up for r in find_routed(graph)}
        for name, value in graph.constants().items():
            wanted = name in matrices or name in self.routers or name in biases or value.ndim == 1
            if not isinstance(value, torch.nn.Parameter) or not wanted:
                continue
            if (known := first.setdefault(value.data_ptr(), name)) != name:
                self._same[name] = known
                continue
            value = value.detach()
            if rank and name in matrices:
                a = torch.randn(rank, value.shape[-1], generator=generator) / math.sqrt(value.shape[-1])
                self.low[name] = torch.nn.Parameter(a), torch.nn.Parameter(torch.zeros(value.numel() // value.shape[-1], rank))
            else:
                self.full[name] = torch.nn.Parameter(value.clone())

    @property
    def names(self) -> list[str]:
        """Every constant that changes."""
        return [*self.full, *self.low, *self._same]

    def __call__(self, name: str) -> Tensor:
        """The constant as it is now; differentiable."""
        name = self._same.get(name, name)
        if name in self.full:
            return self.full[name]
        value = self._graph.tensor(name).detach()
        if name in self.low:
            a, b = self.low[name]
            return value + (b @ a).view_as(value)
        return value

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All trainable tensors by a name of their own, in one order."""
        return dict(self.full) | {f"{n}::{part}": p for n, pair in self.low.items() for part, p in zip("ab", pair, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """A copy of all trainable tensors."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters().items():
            p.data.copy_(state[name])

    @torch.no_grad()
    def merge(self) -> list[str]:
        """Make the graph's constants what they are now; returns their names."""
        for name in [*self.full, *self.low]:
            self._graph.add_tensor(name, self(name).detach().clone())
        for name, source in self._same.items():
            self._graph.add_alias(name, source)
        return self.names


def router_names(graph: Graph) -> set[str]:
    """Constants that only serve to compute gates, of experts and of tokens that skip."""
    inside = {n for r in find_routed(graph) for n in r.router} | {s.scores for s in find_skips(graph)}
    return {str(i.target) for n in inside for i in n.all_input_nodes if i.op == "get_attr"}


def matrix_names(graph: Graph) -> set[str]:
    """Weights of linear layers and experts, without routers, embedding and vocabulary head."""
    regions = find_regions(graph)
    names = {linear.weight for linear in find_linears(graph).values()} | {n for r in regions.routed for n in (r.w_up, r.w_down)}
    tables = {str(n.args[0].target) for n in graph.nodes if n.target is torch.ops.aten.embedding.default}  # type: ignore[union-attr]
    return names - router_names(graph) - tables - ({regions.head.weight} if regions.head is not None else set())
