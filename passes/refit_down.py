"""Pass ``refit-down``: refit each routed FFN's down-projection to what the chosen experts give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.layerwise import ExpertView, Layer, LayerwisePass, set_threshold
from dyncomp.passes.least_squares import LeastSquares
from torch import Tensor

from dyncomp.errors import PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Pass
from dyncomp.sweep import reduced_products

aten = torch.ops.aten


@dataclass(frozen=True)
class RefitDown(LayerwisePass):
    """Least squares on the gated hidden activations; free at run time.

    W_down + Δ and a bias minimise ||y - gated(h) (W_down + Δ)ᵀ - b||² + λ||Δ||², y being what the same FFN gives with every
    expert on, or what brings the residual stream back to the dense model's (``follow-dense``). Layers are refitted in order,
    each on the inputs that the refitted layers before it give; before each fit its threshold is set again, so that the active
    fraction stays what ``fit-router`` made it.

    before:  dyncomp.routed_ffn(x, gates, w_up, w_down)
    after:   dyncomp.routed_ffn(x, gates, w_up, w_down + Δ) + b [+ linear(linear(x, down), up)]
    """

    name: ClassVar[str] = "refit-down"

    ridge: float = 0.2
    """λ, as a fraction of the mean diagonal of the Gram matrix."""
    follow_dense: float = 0.5
    """0 aims at what this FFN gives with every expert on; 1 at the dense model's residual stream, so that a layer also makes
    good for what the layers before it lost (the asymmetric target of GPTAQ, 2504.02692); between them, a blend."""
    bias: bool = True
    """Whether b may be added; servers' mixtures of experts have no place for one."""
    rank: int = 0
    """Of a linear path from x to y that every token takes, fitted together with Δ, of rank * (d_model + d_out) weights; 0 for none."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RequestError(f"refit-down: a path of rank {self.rank} is not possible", hint="give rank=0 for none, or more")

    def sketch(self, kind: str) -> Pass | None:
        return self if kind == "ffn" and self.rank else None

    @property
    def follows_dense(self) -> bool:
        return self.follow_dense > 0

    def visit(self, graph: Graph, layer: Layer) -> None:
        if layer.view.gates.target is torch.ops.dyncomp.threshold_gates.default:
            set_threshold(graph, layer)
            layer.view = ExpertView(graph, layer.view.region)
        refit(graph, layer, self.ridge, self.follow_dense, bias=self.bias, rank=self.rank)


def refit(graph: Graph, layer: Layer, ridge: float, follow: float, *, bias: bool = True, rank: int = 0) -> None:
    """Refit one layer with its gates as they are (see :class:`RefitDown`)."""
    view = layer.view
    if rank and view.region.path is not None:
        raise PassError(f"{view.name} has a linear path already", hint="leave out rank: what is there is kept")
    down = view.w_down.permute(0, 2, 1).flatten(0, 1)  # [E * F, d_out]
    problem = LeastSquares(down.shape[0] + (view.d_model if rank else 0), view.d_out)
    for index, (x, h) in enumerate(zip(layer.inputs, layer.hidden(), strict=True)):
        gates = view.gate_values(x)[..., None]
        flat = x.reshape(-1, view.d_model)
        blend = follow if layer.wanted is not None else 0.0
        with reduced_products():
            missing = ((h * (1 - blend - gates).to(h.dtype)).flatten(1) @ down).float()
        if blend > 0 and layer.wanted is not None:
            missing += blend * (layer.wanted[index].reshape(-1, view.d_out) - view.beside(flat))
        features = (h * gates.to(h.dtype)).flatten(1)
        problem.add(torch.cat([features, flat.to(h.dtype)], 1) if rank else features, missing)
    if rank:
        delta, path_down, path_up, constant_change = problem.solve_in_part(ridge, len(down), rank, bias=bias)
        _add_path(graph, view, path_down.T.contiguous(), path_up.T.contiguous())
    else:
        delta, constant_change = problem.solve(ridge, bias=bias)
    experts = (down + delta).unflatten(0, (view.experts, -1)).transpose(1, 2).contiguous()
    graph.add_tensor(view.region.w_down, experts)
    if bias:
        add_bias(graph, view, constant_change)


def _add_path(graph: Graph, view: ExpertView, down: Tensor, up: Tensor) -> None:
    """Add ``up @ down @ x`` to the region's output: down [rank, d_model], up [d_out, rank]."""
    output, (name_down, name_up) = view.region.output, (f"{view.name}.path.{part}" for part in ("down", "up"))
    graph.add_tensor(name_down, down)
    graph.add_tensor(name_up, up)
    with graph.inserting(after=output, path=f"{view.name}.path") as builder:
        inner = builder.call(aten.linear.default, view.region.input, graph.read(name_down))
        path = builder.call(aten.linear.default, inner, graph.read(name_up))
        added = builder.call(aten.add.Tensor, output, path)
    output.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def add_bias(graph: Graph, view: ExpertView, bias: Tensor) -> None:
    """Add ``bias`` ([d_out]) to the region's output: into the bias it has, or as a new one."""
    if view.region.b_down is not None:
        graph.add_tensor(view.region.b_down, graph.tensor(view.region.b_down).detach() + bias)
        return
    node, name = view.region.node, f"{view.name}.experts.b_down"
    graph.add_tensor(name, bias)
    with graph.inserting(after=node, path=node.meta.get("path")) as builder:
        added = builder.call(aten.add.Tensor, node, graph.read(name))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
