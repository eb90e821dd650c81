"""Feed-forward networks: found by dataflow and described. Module names play no part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph, op_name
from dyncomp.regions.hidden import LEAVE_DENSE, Hidden, walk_back
from dyncomp.regions.linear import (
    RESHAPES,
    Linear,
    Names,
    aten,
    before_reshapes,
    common_path,
    find_linears,
    keeps_last_axis,
    sizes,
)  # fmt: skip
from dyncomp.regions.probe import LAYOUTS, Activation, CannotEvaluate, recognise
from dyncomp.regions.refusal import Refusal


@dataclass(frozen=True)
class FFNWeights:
    """The weights of an FFN in one layout, float32, detached.

    Attributes:
        w_up: [F, d], or [2F, d] when gated: the rows under the activation, then the rows they are multiplied with.
        b_up: [F] or [2F], or None.
        w_down: [d_out, F].
        b_down: [d_out], or None.
    """

    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None


@dataclass(frozen=True)
class FFN:
    """``y = down(activation(up(x)))`` or ``y = down(activation(gate(x)) * up(x))``.

    Attributes:
        name: deepest common module path of its linear layers, for people; unique in its graph.
        input, output: ``x`` with ``d_model`` features on ``input_axis`` and ``y`` with ``d_out`` on ``output_axis``;
            their other dimensions agree.
        ups: one linear, or two: the one under the activation first.
        activation: a name in :data:`dyncomp.activations.ACTIVATIONS`.
        layout: ``"plain"``, ``"separate"``, or how one up-projection holds both halves (:data:`~dyncomp.regions.probe.LAYOUTS`).
        d_ff: hidden neurons F.
        interior: the nodes a rewrite deletes, ``output`` among them.
        shared_weights: other layers read its weights too (ALBERT).
    """

    name: str
    input: fx.Node
    output: fx.Node
    ups: tuple[Linear, ...]
    down: Linear
    activation: str
    gated: bool
    layout: str
    d_model: int
    d_ff: int
    d_out: int
    input_axis: int
    output_axis: int
    interior: frozenset[fx.Node]
    shared_weights: bool

    @property
    def sparse(self) -> bool:
        """Whether some of its linear layers count small inputs as zero. No rewrite may forget that."""
        return any(linear.thresholds is not None for linear in (*self.ups, self.down))

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        linears = (*self.ups, self.down)
        return sum(i.in_features * i.out_features + (i.out_features if i.bias is not None else 0) for i in linears)

    @property
    def flops_per_token(self) -> int:
        """Two per multiply-accumulate of its linear layers."""
        return 2 * sum(i.in_features * i.out_features for i in (*self.ups, self.down))

    def weights(self, graph: Graph) -> FFNWeights:
        """The weights, normalised and contiguous; float32 constants come back as views where their layout allows."""
        matrices = [up.weight_matrix(graph).float() for up in self.ups]
        biases = [up.bias_vector(graph) for up in self.ups]
        b_up: Tensor | None = None
        if any(b is not None for b in biases):
            b_up = torch.cat([m.new_zeros(m.shape[0]) if b is None else b.float() for m, b in zip(matrices, biases, strict=True)])
        w_up = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if self.layout in LAYOUTS and self.layout != "gate|up":
            rows = torch.cat(LAYOUTS[self.layout](torch.arange(w_up.shape[0])))
            w_up, b_up = w_up[rows], None if b_up is None else b_up[rows]
        b_down = self.down.bias_vector(graph)
        w_down = self.down.weight_matrix(graph).float().contiguous()
        return FFNWeights(w_up.contiguous(), b_up, w_down, None if b_down is None else b_down.float())


def find_ffns(graph: Graph, linears: Mapping[fx.Node, Linear] | None = None) -> tuple[list[FFN], list[Refusal]]:
    """All FFNs in graph order, and what looks like one and is not, or may not be rewritten, with reasons."""
    found, refusals = _find(graph, linears)
    reason, remedy = "small inputs of its linear layers count as zero", "run the pass before sparsify"
    return [f for f in found if not f.sparse], refusals + [Refusal(f.name, "ffn", reason, remedy) for f in found if f.sparse]


def find_sparse_ffns(graph: Graph, linears: Mapping[fx.Node, Linear] | None = None) -> list[FFN]:
    """The FFNs with ``dyncomp::sparse_linear`` in them."""
    return [f for f in _find(graph, linears)[0] if f.sparse]


def _find(graph: Graph, linears: Mapping[fx.Node, Linear] | None) -> tuple[list[FFN], list[Refusal]]:
    linears = find_linears(graph) if linears is None else linears
    uses = Counter(linear.weight for linear in linears.values())
    ffns: list[FFN] = []
    refusals: list[Refusal] = []
    claimed: set[fx.Node] = set()
    names = Names()
    for down in linears.values():
        hidden = walk_back(graph, linears, down)
        if not hidden.ups or not (hidden.axes or hidden.problems):
            continue
        found = _assemble(graph, hidden, down, uses, claimed)
        where = common_path(i.node for i in (*hidden.ups, down)) or down.node.name
        if isinstance(found, _Parts):
            ffn = found.ffn(names.take(common_path(i.node for i in (*hidden.ups, down)), down.node))
            claimed |= ffn.interior
            ffns.append(ffn)
        elif found is not None and hidden.nonlinear:
            refusals.append(Refusal(where, "ffn", *found))
    return ffns, refusals


@dataclass(frozen=True)
class _Parts:
    """A recognised FFN before it has a name."""

    input: fx.Node
    output: fx.Node
    down: Linear
    activation: Activation
    interior: frozenset[fx.Node]
    shared: bool

    def ffn(self, name: str) -> FFN:
        kind, first = self.activation, self.activation.ups[0]
        return FFN(
            name=name, input=self.input, output=self.output, ups=kind.ups, down=self.down, interior=self.interior,
            activation=kind.name, gated=kind.gated, layout=kind.layout, input_axis=first.axis, output_axis=self.down.axis,
            d_model=first.in_features, d_ff=self.down.in_features, d_out=self.down.out_features, shared_weights=self.shared,
        )  # fmt: skip


def _assemble(graph: Graph, hidden: Hidden, down: Linear, uses: Counter[str], claimed: set[fx.Node]) -> _Parts | tuple[str, str] | None:
    """The parts of an FFN, or (reason, remedy) why it is none, or None for what is not even alike."""
    if hidden.problems:
        return hidden.problems[0]
    ups = hidden.ups
    roots = {_root(up) for up in ups}
    if len(roots) > 1:
        return "its up-projections read different inputs", LEAVE_DENSE
    try:
        activation = recognise(graph, ups, down)
    except CannotEvaluate as error:
        return f"its activation cannot be run on sample values ({error})", "load the model with its weights"
    if activation is None:
        return "its activation is none we know", "add the function to dyncomp/activations.py"
    if activation.name == "identity" and not activation.gated:
        return None
    d_model = ups[0].in_features
    if d_model != down.out_features:
        return f"it takes {d_model} features and gives {down.out_features}", "nothing to do: only FFNs that keep the width are converted"
    if any(node in claimed for up in ups for node in up.nodes):
        return "it overlaps with the FFN before it", LEAVE_DENSE
    ends = _ends(ups, down)
    if ends is None:
        return "its tokens are grouped differently in its output than in its input", LEAVE_DENSE
    source, output, passed = ends
    interior = frozenset({*hidden.axes, *down.nodes, *passed} | {node for up in ups for node in up.nodes})
    leak = _escape(interior, output, source)
    if leak is not None:
        return f"its hidden activations are also used by {op_name(leak)}", LEAVE_DENSE
    shared = any(uses[linear.weight] > 1 for linear in (*ups, down))
    return _Parts(source, output, down, activation, interior, shared)


def _root(up: Linear) -> fx.Node:
    """What an up-projection reads, before casts and regrouping of tokens."""
    return before_reshapes(up.input)[-1] if up.axis == -1 else up.input


def _ends(ups: list[Linear], down: Linear) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """(input, output, nodes passed): of the equivalent nodes on both sides two whose tokens have the same shape."""
    chains = [before_reshapes(up.input) if up.axis == -1 else [up.input] for up in ups]
    dtype = ups[0].input.meta["val"].dtype
    inputs = [n for n in reversed(chains[0]) if n.meta["val"].dtype == dtype and all(n in chain for chain in chains)]
    if not inputs:  # each up-projection casts or regroups for itself: any of them will do
        inputs = [chains[0][0]]
    outputs = [down.node]
    while down.axis == -1 and len(outputs[-1].users) == 1:
        (user,) = outputs[-1].users
        if user.target not in RESHAPES or not keeps_last_axis(user):
            break
        outputs.append(user)
    for i, output in reversed(list(enumerate(outputs))):
        for source in inputs:
            if _token_sizes(source, ups[0].axis) == _token_sizes(output, down.axis):
                return source, output, outputs[1 : i + 1]
    return None


def _token_sizes(node: fx.Node, axis: int) -> list[Any]:
    shape = list(sizes(node) or ())
    del shape[axis]
    return shape


def _escape(interior: frozenset[fx.Node], output: fx.Node, source: fx.Node) -> fx.Node | None:
    """A node outside that uses a value from inside (the size of a dimension the input has too may be asked for)."""
    available = sizes(source) or ()
    for node in interior:
        if node is output:
            continue
        for user in node.users:
            if user in interior:
                continue
            shape = sizes(node)
            if user.target is aten.sym_size.int and shape is not None and shape[user.args[1]] in available:  # type: ignore[index]
                continue
            return user
    return None
