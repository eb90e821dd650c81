"""What a node of a graph computes, where that is more than calling its target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dyncomp.mapped import trim
from dyncomp.ops import expert_hidden, gated_linear, keep_large, round_entries, routed_ffn, sparse_linear

if TYPE_CHECKING:
    from dyncomp.graph import Graph
    from dyncomp.quantized import Quantized

ACTIVATION_BLOCK = 32
_ROUTED, _SPARSE, _GATED = routed_ffn._opoverload, sparse_linear._opoverload, gated_linear._opoverload
_ROUNDED = round_entries._opoverload


def round_activations(x: Tensor, terms: int = 1) -> Tensor:
    """Round to int8 in blocks of 32 along the last dimension, the scale of each its largest magnitude / 127: [..., K] -> [..., K].

    What kernels for quantized weights do to their inputs, so that products are of integers.

    Args:
        terms: 2 adds what the first rounding left, rounded too: 15 bits for twice the products.
    """
    blocks = x.unflatten(-1, (-1, ACTIVATION_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # Multiplied as the kernels do it: a quotient rounds to another code where it is next to the middle between two. (And `127 / x` is a
    # reciprocal times 127.)
    codes = (blocks * (torch.tensor(127.0) / largest)).round()
    rounded = torch.where(largest >= 1e-35, codes * (largest / 127), 0.0).flatten(-2)
    return rounded if terms == 1 else rounded + round_activations(x - rounded, terms - 1)


def activation_terms(graph: Graph, weight: str) -> int:
    """In how many terms the inputs of a quantized weight are rounded."""
    return 2 if weight in graph.info.get("two_terms", ()) and screen_margin(graph, weight) is None else 1


def screened(x: Tensor, weight: Quantized, decoded: Tensor, bias: Tensor | None, margin: float) -> Tensor:
    """``x @ W.T + bias``, exact where it is large: [..., K] -> [..., N].

    The product with the upper halves of the codes comes first. Rows within ``margin`` of a token's largest get the lower halves as well,
    by degrees over the first nat, so that a difference in the last bit of a float changes little. (SVD-softmax, Shim et al. 2017, previews
    the vocabulary by its leading singular vectors; here the preview is half of the bits, and nothing is kept twice.)

    Args:
        weight: 8 bits.
        decoded: its values.
    """
    result = F.linear(x, weight.preview, bias)
    share = (result - (result.amax(-1, keepdim=True) - margin)).clamp_(0, 1)
    return result.lerp_(F.linear(x, decoded, bias), share)


def screen_margin(graph: Graph, weight: str) -> float | None:
    """The margin of a weight whose products are :func:`screened`."""
    margin: float | None = graph.info.get("screened", {}).get(weight)
    return margin


def rounds_activations(graph: Graph) -> bool:
    """Whether the inputs of quantized weights are rounded to int8 (``quantize{activations=int8}``)."""
    return bool(graph.quantized) and graph.info.get("activations") == "int8"


@contextlib.contextmanager
def float_activations(*graphs: Graph) -> Iterator[None]:
    """Leave activations, keys and values as they are for a while, neither rounded nor counted as zero: to compare two programs, whose
    sums differ by a rounding error that a step of 1/127, or a threshold, would magnify. (A KV cache in int8 stays one.)"""
    before = [graph.info.pop("activations", None) for graph in graphs]
    thresholds = [{str(n.args[3].target): graph.tensor(n.args[3]) for n in sparse_nodes(graph)} for graph in graphs]  # type: ignore[union-attr, arg-type]
    entries = [[n for n in graph.module.graph.nodes if n.target is _ROUNDED] for graph in graphs]
    try:
        for graph, nodes in zip(graphs, entries, strict=True):
            _set_bits(graph, nodes, 32)
        for graph, tensors in zip(graphs, thresholds, strict=True):
            for name, value in tensors.items():
                graph.add_tensor(name, torch.zeros_like(value), trainable=False)
        yield
    finally:
        for graph, info in zip(graphs, before, strict=True):
            if info is not None:
                graph.info["activations"] = info
        for graph, nodes in zip(graphs, entries, strict=True):
            _set_bits(graph, nodes, 8)
        for graph, tensors in zip(graphs, thresholds, strict=True):
            for name, value in tensors.items():
                graph.add_tensor(name, value, trainable=False)


def _set_bits(graph: Graph, nodes: list[fx.Node], bits: int) -> None:
    for node in nodes:
        node.args = (node.args[0], bits)
    if nodes:
        graph.module.recompile()


def sparse_nodes(graph: Graph) -> list[fx.Node]:
    """The ``dyncomp::sparse_linear`` nodes, in graph order."""
    return [node for node in graph.module.graph.nodes if node.target is _SPARSE]


def compute(
    graph: Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], implementations: Mapping[Any, Callable[..., Any]]
) -> Any:
    """The value of a call node.

    Args:
        implementations: what to call instead of a target.
    """
    if rounds_activations(graph):
        position = {torch.ops.aten.linear.default: 1, _SPARSE: 1, _GATED: 2}.get(node.target)  # type: ignore[call-overload]
        weight = node.args[position] if position is not None else None
        if isinstance(weight, fx.Node) and weight.target in graph.quantized:
            if node.target is _SPARSE:  # what counts as zero is decided before the rounding
                x = round_activations(keep_large(args[0], args[3]), activation_terms(graph, str(weight.target)))
                return F.linear(x, *args[1:3])
            name = str(weight.target)
            args = (round_activations(args[0], activation_terms(graph, name)), *args[1:])
            margin = screen_margin(graph, name)
            if margin is not None and node.target is torch.ops.aten.linear.default:
                x, decoded, bias = (*args, None)[:3]
                return screened(x, graph.quantized[name], decoded, bias, margin)
        elif node.target is _ROUTED and isinstance(up := node.args[2], fx.Node) and up.target in graph.quantized:
            return _routed_ffn_rounded(*args, **kwargs)
    return implementations.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]


class Interpreter(fx.Interpreter):
    """Runs a graph node by node, with :func:`compute`."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self._graph, self.extra_traceback = graph, False

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = compute(self._graph, n, args, kwargs, {})
        trim()
        return value


def _routed_ffn_rounded(x: Tensor, gates: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, activation: str) -> Tensor:
    _, d_out, neurons = w_down.shape
    h = expert_hidden(round_activations(x), w_up, b_up, neurons, activation) * gates[..., None]
    return F.linear(round_activations(h.flatten(-2)), w_down.transpose(0, 1).reshape(d_out, -1))
