"""Tracing a stack of equal layers by its first ones.

``torch.export`` runs every layer on symbolic sizes, some milliseconds an operation, and the layers of a transformer are one code with other
weights. Where a ``ModuleList`` holds equal layers, its first :data:`TRACED` are traced; when the last of these are the same nodes, each fed
by the one before it, the layers that were left out are written as further copies of the last.

Nothing is taken on trust: layers whose attributes differ in more than their own index, configurations with a list of something by layer,
and graphs that do more with a layer than hand it to the next are traced in full, and a graph with weights is compared with its module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dyncomp.graph import Graph
from dyncomp.interpret import Interpreter
from dyncomp.mapped import trim

TRACED = 4
"""Layers that are traced. The first may do what the others use; the second, third and fourth are to be the same."""
_SHORTEST = 6
"""A stack of fewer layers is traced in full: there would be nothing to win."""
_TOLERANCE = 1e-3
_UNSEEN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@dataclass(frozen=True)
class Stack:
    """Layers that differ in nothing but their weights and their index.

    Args:
        path: of the ``ModuleList``.
        layers: all of them.
    """

    path: str
    layers: nn.ModuleList

    def layer_of(self, node: fx.Node) -> int | None:
        """The index of the layer that a node belongs to; of a ``get_attr`` node, that its tensor belongs to."""
        name = str(node.target) if node.op == "get_attr" else node.meta.get("path", "")
        head, _, rest = name.removeprefix(f"{self.path}.").partition(".")
        inside = name.startswith(f"{self.path}.") and head.isdecimal() and (rest or node.op != "get_attr")
        return int(head) if inside else None


def find_stacks(module: nn.Module) -> list[Stack]:
    """Stacks of layers that can be told from their first ones; none inside another."""
    stacks: list[Stack] = []
    for path, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) < _SHORTEST or any(path.startswith(f"{s.path}.") for s in stacks):
            continue
        if len(set(layers)) == len(layers) and all(_alike(layers[1], layer, 1, i) for i, layer in enumerate(layers) if i > 1):
            stacks.append(Stack(path, layers))
    lengths = {len(s.layers) for s in stacks}
    return [] if any(_differs_by_layer(m.config, lengths) for m in module.modules() if hasattr(m, "config")) else stacks


def _alike(a: nn.Module, b: nn.Module, index: int, other: int) -> bool:
    """Whether two modules run the same code on weights of the same shapes, so far as their attributes tell."""
    if type(a) is not type(b) or list(a._modules) != list(b._modules):
        return False
    for tensors, others in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if {n: _kind(t) for n, t in tensors.items()} != {n: _kind(t) for n, t in others.items()}:
            return False
    plain, beside = ({n: v for n, v in vars(m).items() if n not in _UNSEEN} for m in (a, b))
    if plain.keys() != beside.keys():
        return False
    for name, value in plain.items():
        if type(value) is int and (value, beside[name]) == (index, other):
            continue
        if value is not beside[name] and not _equal(value, beside[name]):
            return False
    return all(
        (x is None and y is None) or (x is not None and y is not None and _alike(x, y, index, other))
        for x, y in zip(a._modules.values(), b._modules.values(), strict=True)
    )


def _kind(tensor: Tensor | None) -> object:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _equal(a: object, b: object) -> bool:
    with contextlib.suppress(Exception):  # what cannot be compared counts as different
        return bool(a == b)
    return False


def _differs_by_layer(config: object, lengths: set[int]) -> bool:
    """Whether a configuration lists, for each layer of a stack, something that is not the same for all."""
    values = vars(config).values() if hasattr(config, "__dict__") else ()
    return any(isinstance(v, (list, tuple)) and len(v) in lengths and any(item != v[1] for item in v[1:]) for v in values)


@contextlib.contextmanager
def shortened(stacks: Sequence[Stack]) -> Iterator[None]:
    """Let the module run the first :data:`TRACED` layers of each stack alone."""
    whole = [dict(s.layers._modules) for s in stacks]
    try:
        for stack, layers in zip(stacks, whole, strict=True):
            stack.layers._modules = dict(list(layers.items())[:TRACED])
        yield
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack.layers._modules = layers


def repeat(graph: Graph, stack: Stack) -> bool:
    """Write the layers that were not traced; says whether that was possible. Otherwise nothing is changed."""
    nodes = graph.nodes
    layers = [[n for n in nodes if n.op == "call_function" and stack.layer_of(n) == i] for i in range(TRACED)]
    pairs = _pairs(stack, layers)
    if pairs is None:
        return False
    order = {node: i for i, node in enumerate(nodes)}
    last, end = layers[-1], nodes[max(order[n] for n in layers[-1])]
    outside = {node: [u for u in node.users if u not in pairs] for node in last}
    if any(order[user] < order[end] for users in outside.values() for user in users):
        return False
    constants = [n for n in nodes if n.op == "get_attr" and stack.layer_of(n) == TRACED - 1 and n.users]
    whole = stack.layers
    tensors: dict[str, Tensor] = dict([*whole.named_parameters(remove_duplicate=False), *whole.named_buffers(remove_duplicate=False)])
    place = constants[-1] if constants else end
    copies = {node: node for node in last}  # as they are in the layer before the one that is written
    for index in range(TRACED, len(stack.layers)):
        moved = {}
        for node in constants:
            name = _renamed(stack, str(node.target), index)
            graph.share(name, tensors[name.removeprefix(f"{stack.path}.")])
            with graph.module.graph.inserting_after(place):
                place = moved[node] = graph.module.graph.get_attr(name)
            place.meta = dict(node.meta)
        for node in last:
            with graph.module.graph.inserting_after(end):
                end = graph.module.graph.node_copy(node, partial(_source, stack, pairs, moved, copies))
            end.meta = dict(node.meta, path=_renamed(stack, node.meta["path"], index))
            moved[node] = end
        copies = {node: moved[node] for node in last}
    for node, users in outside.items():
        for user in users:
            user.replace_input_with(node, copies[node])
    return True


def _pairs(stack: Stack, layers: list[list[fx.Node]]) -> dict[fx.Node, fx.Node] | None:
    """Node of a layer -> the one that is the same in the next layer (the last layer's nodes stand for themselves); None where the second
    to the last are not the same nodes, each using what the layer before it made, and what all use."""
    pairs: dict[fx.Node, fx.Node] = {}
    for position in range(1, TRACED - 1):
        here, beyond = layers[position], layers[position + 1]
        if not here or len(here) != len(beyond):
            return None
        pairs |= dict(zip(here, beyond, strict=True))
    pairs |= {node: node for node in layers[-1]}

    def same(a: Any, b: Any, position: int) -> bool:
        """Whether an argument in layer ``position`` is, in the next layer, ``b``."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a.op == "get_attr" and stack.layer_of(a) is not None:
                return b.op == "get_attr" and b.target == _renamed(stack, str(a.target), position + 1) and stack.layer_of(a) == position
            made = stack.layer_of(a) if a.op == "call_function" else None
            if made == position or (made == position - 1 and position > 1):
                return pairs[a] is b
            if position == 1 and stack.layer_of(b) == 1 and b.op == "call_function":  # what the first layer made is of its own kind
                return True
            return a is b
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same(x, y, position) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and bool(a == b)

    for position in range(1, TRACED - 1):
        for a, b in zip(layers[position], layers[position + 1], strict=True):
            keywords = a.kwargs.keys() == b.kwargs.keys() and all(same(a.kwargs[k], b.kwargs[k], position) for k in a.kwargs)
            if a.target is not b.target or not same(a.args, b.args, position) or not keywords:
                return None
            if any(stack.layer_of(u) not in (position, position + 1) or u.op != "call_function" for u in a.users):
                return None
    sized = [n.meta.get("val") for n in layers[-1]]
    return None if any(isinstance(v, (Tensor, torch.SymInt)) and free_unbacked_symbols(v) for v in sized) else pairs


def _source(
    stack: Stack, pairs: Mapping[fx.Node, fx.Node], moved: Mapping[fx.Node, fx.Node], before: Mapping[fx.Node, fx.Node], node: fx.Node
) -> fx.Node:
    """What a copy of the last layer reads in place of ``node``: its own nodes, or those of the copy before it."""
    if node in moved:
        return moved[node]
    return before[pairs[node]] if node in pairs and stack.layer_of(node) == TRACED - 2 else node


def _renamed(stack: Stack, name: str, index: int) -> str:
    """The name of the same tensor or module in another layer."""
    _, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
    return f"{stack.path}.{index}" + (f".{rest}" if rest else "")


def computes(graph: Graph, module: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a graph gives what a module gives; of a module without weights nothing can be said, and nothing is.

    Weights that are in files are in memory a few at a time.
    """
    if any(t.is_meta for t in [*inputs.values(), *module.parameters()]):
        return True
    hook = nn.modules.module.register_module_forward_hook(lambda *_: trim())
    try:
        with torch.no_grad():
            found, wanted = Interpreter(graph).run(*(inputs[s.name] for s in graph.inputs)), module(**inputs)
    finally:
        hook.remove()
    pairs = zip(found, (wanted,) if isinstance(wanted, Tensor) else wanted, strict=True)
    return all(float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in ((x.float(), y.float()) for x, y in pairs))
