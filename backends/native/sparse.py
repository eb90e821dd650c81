"""``dyncomp.sparse_linear`` -> the native operator that skips inputs, or a plain linear layer of inputs with zeros.

``ops`` is the backend's module of operators, with a function ``sparse_linear``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from dyncomp.backends.native import ACTIVATION_CODES, pack_input_scales, pack_inputs
from torch import fx

from dyncomp.graph import Builder, Graph
from dyncomp.hardware import detect
from dyncomp.interpret import activation_terms, sparse_nodes
from dyncomp.quantized import Quantized, join
from dyncomp.regions import FFN, find_sparse_ffns, replace_ffn
from dyncomp.regions.linear import Linear

aten = torch.ops.aten
_NONE = -1

_GATHER_BELOW = {"avx512_vnni": {8: 0.85, 4: 0.85}, "": {8: 0.45, 4: 0.2}}


@functools.cache
def gather_below(bits: int) -> float:
    """Active fraction up to which skipping inputs is taken to be faster than the dense kernel, which reads its weights in order. Above it
    the dense kernel runs.

    Measured for one token, weights from memory, 1 and 2 threads. With AVX-512 the two cross between 0.75 (576 outputs) and 1 (3072
    outputs). With AVX2, in 8 bits, gathering is 1.6 to 2.8 times as fast at 0.25, 0.9 to 1.2 times at 0.5, and half as fast at 0.75; in
    4 bits, where arithmetic takes longer than memory, 0.8 to 1.8 times at 0.25.
    """
    vector = detect().vector
    return next(below for name, below in _GATHER_BELOW.items() if not name or name in vector)[bits]


def select_sparse_ffns(graph: Graph, ops: Any) -> None:
    """Gated FFNs whose up-projections share their thresholds -> one operator for both, activation and product inside.

    before:  g = sparse_linear(x, Wg, t); u = sparse_linear(x, Wu, t); sparse_linear(silu(g) * u, Wd, s)
    after:   SparseLinear(SparseLinear(x, [Wg; Wu], t, silu), Wd, s)
    """
    for ffn in find_sparse_ffns(graph):
        up = _joined_up(graph, ffn)
        if up is None or (down := _gathered(graph, ffn.down)) is None:
            continue
        _replace(graph, ffn, up, down, ops)
    graph.clean()


def select_sparse_linears(graph: Graph, ops: Any | None) -> None:
    """What is left: the native operator, if there is one, where it pays (see :func:`gather_below`), otherwise zeros in the input of a
    plain linear layer."""
    for node in sparse_nodes(graph):
        x, weight, bias, thresholds = node.args
        assert isinstance(weight, fx.Node)
        assert bias is None or isinstance(bias, fx.Node)
        name = str(weight.target)
        value = graph.quantized.get(name) if ops is not None else None
        with graph.inserting(before=node) as b:
            if value is not None and activation_terms(graph, name) == 1 and _pays(graph, name):
                y = _call(graph, b, ops, x, thresholds, name, value, bias, _NONE)
            else:
                small = b.call(aten.le.Tensor, b.call(aten.abs.default, x), thresholds)
                kept = b.call(aten.where.ScalarSelf, small, 0.0, x)
                y = b.call(aten.linear.default, kept, weight, *(() if bias is None else (bias,)))
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


def sparse_kernels(graph: Graph, gathering: int) -> dict[str, Any]:
    """For an artifact's configuration: how the sparse linear layers of ``graph`` are computed.

    Args:
        gathering: calls of the native operator.
    """
    return {
        "layers": len(sparse_nodes(graph)),
        "gathering_operators": gathering,
        "gather_below": {f"int{bits}": gather_below(bits) for bits in (8, 4)},
    }


def _pays(graph: Graph, name: str) -> bool:
    return active_inputs(graph, name) <= gather_below(graph.quantized[name].bits)


def active_inputs(graph: Graph, name: str) -> float:
    """The fraction of a sparse weight's inputs that counted in calibration; 1 when nobody noted it."""
    return float(graph.info.get("active_inputs", {}).get(name, 1.0))


def _gathered(graph: Graph, linear: Linear) -> Quantized | None:
    value = graph.quantized.get(linear.weight)
    return value if value is not None and linear.thresholds is not None and _pays(graph, linear.weight) else None


def _joined_up(graph: Graph, ffn: FFN) -> Quantized | None:
    """The weights of gate and up one after the other, if one operator can compute both."""
    if not ffn.gated or ffn.layout != "separate" or ffn.input_axis != -1 or ffn.activation not in ACTIVATION_CODES or ffn.d_ff % 16:
        return None
    parts = [_gathered(graph, up) for up in ffn.ups]
    same = len({up.thresholds for up in ffn.ups}) == 1
    return join([p for p in parts if p is not None]) if same and all(p is not None for p in parts) else None


def _replace(graph: Graph, ffn: FFN, up: Quantized, down: Quantized, ops: Any) -> None:
    weights = ffn.weights(graph)
    biases = {}
    for part, value in (("up", weights.b_up), ("down", weights.b_down)):
        if value is not None:
            graph.add_tensor(f"{ffn.name}.{part}_bias", value, trainable=False)
        biases[part] = None if value is None else graph.read(f"{ffn.name}.{part}_bias")
    thresholds = [graph.read(str(linear.thresholds)) for linear in (ffn.ups[0], ffn.down)]

    def build(b: Builder, x: fx.Node) -> fx.Node:
        h = _call(graph, b, ops, x, thresholds[0], f"{ffn.name}.up", up, biases["up"], ACTIVATION_CODES[ffn.activation])
        return _call(graph, b, ops, h, thresholds[1], f"{ffn.name}.down", down, biases["down"], _NONE)

    replace_ffn(graph, ffn, build)


def _call(
    graph: Graph, b: Builder, ops: Any, x: Any, thresholds: Any, name: str, value: Quantized, bias: fx.Node | None, activation: int
) -> fx.Node:  # fmt: skip
    """The native operator; its constants are made here."""
    parts = {"codes": torch.from_numpy(pack_inputs(value.codes.numpy(), value.bits))}
    for part, half in (("scales", value.scales), ("offsets", value.offsets)):
        if half is not None:
            parts[part] = torch.from_numpy(pack_input_scales(half.numpy()))
    for part, tensor in parts.items():
        graph.add_tensor(f"{name}_by_input_{part}", tensor, trainable=False)
    nodes = [graph.read(f"{name}_by_input_{part}") if part in parts else None for part in ("codes", "scales", "offsets")]
    rows, columns = value.codes.shape
    return b.call(ops.sparse_linear, x, thresholds, *nodes, bias, rows, columns, value.bits, value.block, activation)
