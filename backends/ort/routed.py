"""Routed FFNs with float weights -> the native operator, the router inside."""

from __future__ import annotations

import torch
from dyncomp.backends.native import pack_floats
from dyncomp.backends.native.select import ffn_attributes, inner_router, with_base
from dyncomp.backends.ort import ops

from dyncomp.graph import Graph
from dyncomp.regions import find_routed


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
        total, base = with_base(routed)
        with graph.inserting(before=total, path=routed.name) as b:
            weights = graph.read(names[0]), graph.read(names[1])
            y = b.call(ops.float_ffn, routed.input, gates, weights[0], up_bias, weights[1], router, down_bias, attributes, *base)
        total.replace_all_uses_with(y)
    graph.clean()
