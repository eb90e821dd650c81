"""Operations under gates of tokens -> a branch that gathers the tokens whose gate is open, computes them and scatters them back.

In two steps: the graph to export marks where rows are taken and put back; the ONNX model then gets an ``If`` around what lies between.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from dyncomp.backends.attention import fused_linear
from dyncomp.backends.ort import ops
from dyncomp.backends.ort.rows import join_rows
from torch import fx

from dyncomp.activations import emit_activation
from dyncomp.graph import Builder, Graph
from dyncomp.interpret import activation_terms
from dyncomp.ops import gated_linear, routed_ffn, sparse_linear, threshold_gates, topk_gates
from dyncomp.regions.depth import gated_sparse
from dyncomp.regions.hidden import is_pointwise

aten = torch.ops.aten
_GATED, _ROUTED = gated_linear._opoverload, routed_ffn._opoverload
_BINARY = {threshold_gates._opoverload, topk_gates._opoverload}


def select_gated(graph: Graph, *, native: bool = False) -> None:
    """Lower every ``dyncomp.gated_linear``, every ``dyncomp.routed_ffn`` with one expert, and what is multiplied by gates of tokens.

    Our own kernels take the gates themselves: with ``native`` those with quantized weights and all with one expert are left for them. An
    operator costs less than a branch that gathers and scatters, a tenth of a layer that one token computes.

    before:  gated_linear(x, gates, W, b)
    after:   put_rows(linear(take_rows(x, gates), W, b), gates)
    before:  sparse_linear(silu(sparse_linear(x, Wg, s)) * sparse_linear(x, Wu, s), Wd, t) * gates
    after:   the same of take_rows(x, gates), put_rows(…, gates)
    """
    _fuse_projections(graph)
    for node in graph.nodes:
        if node.target is _GATED:
            x, gates, weight, bias = (*node.args, None)[:4]
            if native and str(weight.target) in graph.quantized and activation_terms(graph, str(weight.target)) == 1:  # type: ignore[union-attr]
                continue
            with graph.inserting(before=node) as b:
                y = b.call(aten.linear.default, b.call(ops.take_rows, x, gates), weight, *([bias] if bias is not None else []))
                _put(b, node, y, gates)
        elif node.target is _ROUTED and not native and node.args[1].meta["val"].shape[-1] == 1 and node.args[0].meta["val"].dim() == 3:  # type: ignore[union-attr]
            x, gates, *_ = node.args
            with graph.inserting(before=node) as b:
                _put(b, node, _expert(graph, b, b.call(ops.take_rows, x, gates), node), gates)
        elif (sparse := gated_sparse(node)) is not None and _binary(node.args[1]):
            with graph.inserting(before=node) as b:
                _put(b, node, _rows(b, sparse, node.args[1], _own(node)), node.args[1])
    graph.clean()
    join_rows(graph)


def select_token_gates(graph: Graph) -> None:
    """Gates of tokens by a threshold, where something stands in for the layer that the others compute -> one native operator.

    before:  gates = threshold_gates(linear(x, W, b) + first);  closed = 1 - gates
    after:   gates, closed = token_gates(x, W, b, first)
    """
    for node in graph.nodes:
        if node.target is not threshold_gates._opoverload or node.meta["val"].shape[-1] != 1:
            continue
        scores, first = _kept_first(node.args[0])
        inverted = [u for u in node.users if u.target is aten.rsub.Scalar and u.args[1:] == (1,)]
        if not inverted or scores is None or len(scores.args) != 3 or not _is_float_tokens(scores.args[0]):
            continue
        with graph.inserting(before=node) as b:
            both = b.call(ops.token_gates, *scores.args, first)
            gates, closed = (b.call(operator.getitem, both, i) for i in (0, 1))
        for user in inverted:
            user.replace_all_uses_with(closed)
        node.replace_all_uses_with(gates)
    graph.clean()


def _kept_first(scores: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """(the linear layer that scores tokens, what keeps the first of them), or Nones."""
    first = None
    if scores.target is aten.add.Tensor and not scores.kwargs:
        scores, first = scores.args
    known = isinstance(scores, fx.Node) and scores.target is aten.linear.default
    return (scores, first) if known and (first is None or isinstance(first, fx.Node)) else (None, None)


def _is_float_tokens(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.dim() == 3


def _fuse_projections(graph: Graph) -> None:
    """Gated linear layers that read the same x under the same gates (queries, keys and values) -> one, and slices of what it gives."""
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is _GATED:
            alike.setdefault((*node.args[:2], None), []).append(node)
        elif (sparse := gated_sparse(node)) is not None:
            alike.setdefault((sparse.args[0], node.args[1], sparse.args[3]), []).append(node)
    for (x, gates, thresholds), nodes in alike.items():
        if len(nodes) == 1:
            continue
        with graph.inserting(before=nodes[0]) as b:
            linears = [b.call(aten.linear.default, x, *n.args[2:]) if thresholds is None else _again(b, n.args[0]) for n in nodes]
            fused = fused_linear(graph, b, linears)
            if fused is not None:
                y = b.call(_GATED, x, gates, *fused.args[1:]) if thresholds is None else b.call(aten.mul.Tensor, fused, gates)
                start = 0
                for node in nodes:
                    width = int(node.meta["val"].shape[-1])
                    node.replace_all_uses_with(b.call(aten.slice.Tensor, y, 2, start, start + width))
                    start += width
    graph.clean()


def _again(b: Builder, node: Any) -> fx.Node:
    return b.call(node.target, *node.args)


def _own(mark: fx.Node) -> set[fx.Node]:
    """What treats each token by itself and is only for ``mark``, as far back as linear layers and what is pointwise reach."""
    found: set[fx.Node] = set()
    waiting = [a for a in mark.args if isinstance(a, fx.Node)]
    while waiting:
        node = waiting.pop(0)
        if node in found or not all(u is mark or u in found for u in node.users) or not _is_token_wise(node):
            continue
        found.add(node)
        waiting += node.all_input_nodes
    return found


def _is_token_wise(node: fx.Node) -> bool:
    if node.target in (sparse_linear._opoverload, aten.linear.default):
        return True
    value = node.meta.get("val")
    tensors = [n.meta["val"] for n in node.all_input_nodes]
    return is_pointwise(node.target) and not node.kwargs and all(str(t.shape) == str(value.shape) for t in tensors)  # type: ignore[union-attr]


def _rows(b: Builder, node: fx.Node, gates: Any, own: set[fx.Node]) -> fx.Node:
    """``node`` [B, S, features] for the tokens whose gate is open: [n, features]."""
    if node not in own:
        return b.call(ops.take_rows, node, gates)
    first, *others = node.args
    if is_pointwise(node.target):
        others = [_rows(b, a, gates, own) if isinstance(a, fx.Node) else a for a in others]
    return b.call(node.target, _rows(b, first, gates, own), *others)  # type: ignore[arg-type]


def _put(b: Builder, node: fx.Node, y: fx.Node, gates: Any) -> None:
    node.replace_all_uses_with(b.call(ops.put_rows, y, gates, _binary(gates)))
    b.graph.module.graph.erase_node(node)


def _expert(graph: Graph, b: Builder, x: fx.Node, node: fx.Node) -> fx.Node:
    """The one expert of a ``routed_ffn`` for every row: [n, d] -> [n, d_out]."""
    _, _, w_up, b_up, w_down, activation = node.args
    up, down = (graph.tensor(w).detach()[0] for w in (w_up, w_down))  # type: ignore[arg-type]
    bias = graph.tensor(b_up).detach()[0] if b_up is not None else None  # type: ignore[arg-type]
    neurons = down.shape[1]
    hidden = []
    for index in range(up.shape[0] // neurons):
        rows = slice(index * neurons, (index + 1) * neurons)
        weight = f"{w_up.target}_{index}"  # type: ignore[union-attr]
        graph.add_tensor(weight, up[rows].contiguous())
        arguments = [graph.read(weight)]
        if bias is not None:
            graph.add_tensor(f"{weight}_bias", bias[rows].contiguous())
            arguments.append(graph.read(f"{weight}_bias"))
        hidden.append(b.call(aten.linear.default, x, *arguments))
    h = hidden[0] if activation == "identity" else emit_activation(b.call, str(activation), hidden[0])
    if len(hidden) == 2:
        h = b.call(aten.mul.Tensor, h, hidden[1])
    graph.add_tensor(f"{w_down.target}_0", down.contiguous())  # type: ignore[union-attr]
    return b.call(aten.linear.default, h, graph.read(f"{w_down.target}_0"))  # type: ignore[union-attr]


def _binary(gates: Any) -> bool:
    """Whether the gates can be seen to be 0 or 1."""
    if gates.target in _BINARY:
        return True
    if gates.target is aten.rsub.Scalar:
        return gates.args[1] == 1 and len(gates.args) == 2 and _binary(gates.args[0])
    return gates.target is aten.mul.Tensor and all(isinstance(a, fx.Node) and _binary(a) for a in gates.args)


# ---- the ONNX model ------------------------------------------------------------------------------------------------
def expand_gated(model: Any) -> None:
    """Put what lies between every ``dyncomp.TakeRows`` and ``dyncomp.PutRows`` of an ``onnx_ir.Model`` into a branch.

    before:  y = PutRows(f(TakeRows(x, gates)), gates)
    after:   y = If(any(gates), rows = Transpose(NonZero(gates)); ScatterND(zeros, rows, f(GatherND(x, rows))), zeros)

    One token then computes f or nothing; many compute f for those whose gate is open. ``MergeRows`` is two such branches, the second
    of which scatters into what the first gives.
    """
    import onnx_ir as ir

    known: dict[Any, Any] = {}
    for node in list(model.graph):
        if node.domain != "dyncomp" or node.op_type not in ("PutRows", "MergeRows"):
            continue
        branches = _Branches(ir, model.graph, node, known)
        if node.op_type == "PutRows":
            y = branches.add(node.inputs[0], node.inputs[1], None, binary=bool(node.attributes["binary"].as_int()))
        else:
            opened, closed, gates, others = node.inputs
            y = branches.add(opened, gates, branches.add(closed, others, None, binary=True), binary=True)
        branches.replace(y)
    model.graph.remove([n for n in model.graph if (n.domain, n.op_type) == ("dyncomp", "TakeRows") and not n.outputs[0].uses()])


class _Branches:
    """The branches that stand for one mark.

    Args:
        known: whether any gate is open, by gates; and the numbers of tokens [2] under None.
    """

    def __init__(self, ir: Any, graph: Any, mark: Any, known: dict[Any, Any]) -> None:
        self.ir, self.graph, self.mark, self.known = ir, graph, mark, known
        self.tape, self.count = ir.tape.Tape(), 0

    def add(self, y: Any, gates: Any, base: Any, *, binary: bool) -> Any:
        """``base`` (zeros when None) with the rows y where the gates are not 0; what makes y moves into the branch."""
        ir, last = self.ir, self.ir.tape.Tape()
        inside, takes = _between(y)
        inside, y = self._private(inside, y)
        first = ir.tape.Tape()
        rows = first.op("Transpose", [first.op("NonZero", [first.op("Squeeze", [gates, _ints(ir, first, 2)])])], {"perm": [1, 0]})  # [n, 2]
        gathered = {take.outputs[0]: first.op("GatherND", [take.inputs[0], rows]) for take in takes}
        y = gathered.get(y, y)
        for node in inside:
            for index, value in enumerate(node.inputs):
                if value in gathered:
                    node.replace_input_with(index, gathered[value])
            for value in node.outputs:
                value.shape = None  # that of all tokens, which these are not
        if not binary:
            y = last.op("Mul", [y, last.op("GatherND", [gates, rows])])
        result = last.op("ScatterND", [self._zeros(last) if base is None else base, rows, y])
        empty = ir.tape.Tape()
        nothing = self._zeros(empty) if base is None else empty.op("Identity", [base])
        self.count += 1
        name = f"{self.mark.outputs[0].name}_{self.count}"
        branches = {
            "then_branch": _graph(ir, [*first.nodes, *inside, *last.nodes], result, f"{name}_computed"),
            "else_branch": _graph(ir, list(empty.nodes), nothing, f"{name}_skipped"),
        }
        return self.tape.op("If", [self._any(gates, binary)], branches)

    def _private(self, inside: list[Any], y: Any) -> tuple[list[Any], Any]:
        """The nodes from the rows to ``y``, and ``y``; copies of those that something outside the branch reads as well."""
        shared: set[Any] = set()
        for node in reversed(inside):
            readers = {use.node for value in node.outputs for use in value.uses()} - {self.mark}
            if any(reader in shared or reader not in inside for reader in readers):
                shared.add(node)
        copied: dict[Any, Any] = {}
        nodes = []
        for node in inside:
            if node in shared:
                inputs = [copied.get(value, value) for value in node.inputs]
                copy = self.ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
                copied |= dict(zip(node.outputs, copy.outputs, strict=True))
                nodes.append(copy)
                continue
            for index, value in enumerate(node.inputs):
                if value in copied:
                    node.replace_input_with(index, copied[value])
            nodes.append(node)
        self.graph.remove([n for n in inside if n not in shared])
        return nodes, copied.get(y, y)

    def replace(self, y: Any) -> None:
        y.type = self.mark.outputs[0].type
        self.ir.convenience.replace_nodes_and_values(self.graph, self.mark, [self.mark], list(self.tape.nodes), [self.mark.outputs[0]], [y])

    def _any(self, gates: Any, binary: bool) -> Any:
        if gates not in self.known:
            largest = self.tape.op("ReduceMax", [gates if binary else self.tape.op("Abs", [gates])], {"keepdims": 0})
            self.known[gates] = self.tape.op("Cast", [largest], {"to": int(self.ir.DataType.BOOL)})
        return self.known[gates]

    def _zeros(self, tape: Any) -> Any:
        """[B, S, width]."""
        if None not in self.known:
            gates = self.mark.inputs[1 if self.mark.op_type == "PutRows" else 2]
            self.known[None] = self.tape.op("Shape", [gates], {"start": 0, "end": 2})
        shape = tape.op("Concat", [self.known[None], _ints(self.ir, tape, self.mark.attributes["width"].as_int())], {"axis": 0})
        return tape.op("ConstantOfShape", [shape], {"value": self.ir.tensor(np.zeros(1, np.float32))})


def _ints(ir: Any, tape: Any, *values: int) -> Any:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})


def _between(y: Any) -> tuple[list[Any], list[Any]]:
    """(nodes from the rows that were taken to ``y``, in order; the ``TakeRows`` nodes)."""
    order: list[Any] = []
    takes: list[Any] = []
    seen: dict[Any, bool] = {}

    def visit(node: Any) -> bool:
        """Whether it is computed from rows that were taken."""
        if node in seen:
            return seen[node]
        if (node.domain, node.op_type) == ("dyncomp", "TakeRows"):
            takes.append(node)
            seen[node] = True
            return True
        before = [visit(value.producer()) for value in node.inputs if value is not None and value.producer() is not None]
        seen[node] = any(before)
        if seen[node]:
            order.append(node)
        return seen[node]

    visit(y.producer())
    return order, takes


def _graph(ir: Any, nodes: list[Any], output: Any, name: str) -> Any:
    for index, node in enumerate(nodes):  # names are global: give each branch its own
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_{index}_{i}"
    return ir.Graph([], [output], nodes=nodes, name=name)
