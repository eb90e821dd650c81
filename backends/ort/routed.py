"""Routed FFNs with float weights -> the native operator, the router inside."""

from __future__ import annotations

import torch
from dyncomp.backends.ort import ops
from dyncomp.backends.ort.native import ACTIVATION_CODES, pack_floats
from torch import fx

from dyncomp.graph import Graph
from dyncomp.ops import threshold_gates, topk_gates
from dyncomp.regions import RoutedFFN, find_routed

aten = torch.ops.aten
_THRESHOLD, _TOPK = threshold_gates._opoverload, topk_gates._opoverload


def select_routed_ffns(graph: Graph) -> None:
    """Every ``dyncomp.routed_ffn`` that is left -> one native operator, gates, activation and biases inside."""
    for routed in find_routed(graph):
        experts, d_out, neurons = graph.tensor(routed.w_down).shape
        up, down = graph.tensor(routed.w_up).detach(), graph.tensor(routed.w_down).detach()
        names = f"{routed.w_up}_tiles", f"{routed.w_down}_tiles"
        graph.add_tensor(names[0], torch.from_numpy(pack_floats(up.unflatten(1, (-1, neurons)).numpy())), trainable=False)
        graph.add_tensor(names[1], torch.from_numpy(pack_floats(down.numpy())), trainable=False)
        up_bias = graph.read(routed.b_up) if routed.b_up is not None else None
        down_bias = graph.read(routed.b_down) if routed.b_down is not None else None
        router, k = inner_router(routed)
        gates = routed.gates if router == (None, None) else None
        attributes = ffn_attributes(experts, routed.d_model, neurons, d_out, routed.gated, routed.activation, k)
        with graph.inserting(before=routed.output, path=routed.name) as b:
            weights = graph.read(names[0]), graph.read(names[1])
            y = b.call(ops.float_ffn, routed.input, gates, weights[0], up_bias, weights[1], router, down_bias, attributes)
        routed.output.replace_all_uses_with(y)
    graph.clean()


def inner_router(routed: RoutedFFN) -> tuple[tuple[fx.Node | None, fx.Node | None], int]:
    """Weight and bias of a linear router for the operator to compute, or Nones; and how many experts it opens, 0 for those of
    positive scores."""
    scores = routed.gates.args[0] if routed.gates.target in (_THRESHOLD, _TOPK) else None
    if not isinstance(scores, fx.Node) or scores.target is not aten.linear.default or len(scores.args) != 3:
        return (None, None), 0
    x, weight, bias = scores.args
    if x is not routed.input or not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (weight, bias)):
        return (None, None), 0
    k = int(routed.gates.args[1]) if routed.gates.target is _TOPK else 0  # type: ignore[arg-type]
    return (weight, bias), k  # type: ignore[return-value]


def ffn_attributes(
    experts: int, columns: int, neurons: int, rows: int, gated: bool, activation: str, k: int = 0
) -> tuple[tuple[str, int], ...]:
    """Those that the native operators on experts share."""
    return tuple({
        "experts": experts, "columns": columns, "neurons": neurons, "rows": rows, "gated": int(gated),
        "activation": ACTIVATION_CODES[activation], "k": k,
    }.items())  # fmt: skip
