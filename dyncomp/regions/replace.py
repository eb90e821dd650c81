"""Replacing a feed-forward network by other nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from dyncomp.errors import GraphError
from dyncomp.graph import Builder, Graph
from dyncomp.regions.ffn import FFN
from dyncomp.regions.linear import aten, sizes


def replace_ffn(graph: Graph, ffn: FFN, build: Callable[[Builder, fx.Node], fx.Node]) -> fx.Node:
    """Replace the FFN's output by what ``build(builder, x)`` returns, and erase the FFN. The caller runs ``graph.clean()``.

    Args:
        build: gets a builder in place and ``x: [..., d_model]`` with the features last, whatever layout the graph has
            there; returns ``y: [..., d_out]``.

    Returns:
        The node that now stands for ``ffn.output``, in its layout and dtype.

    Raises:
        GraphError: what was built has another shape than the FFN's output.
    """
    with graph.inserting(before=ffn.output, path=ffn.name) as builder:
        x = ffn.input
        rank = len(x.meta["val"].shape)
        if ffn.input_axis % rank != rank - 1:
            x = builder.call(aten.movedim.int, x, ffn.input_axis, -1)
        y = build(builder, x)
        if ffn.output_axis % rank != rank - 1:
            y = builder.call(aten.movedim.int, y, -1, ffn.output_axis)
        if y.meta["val"].dtype != ffn.output.meta["val"].dtype:
            y = builder.call(aten.to.dtype, y, ffn.output.meta["val"].dtype)
    if sizes(y) != sizes(ffn.output):
        raise GraphError(f"the replacement of {ffn.name} has the shape {sizes(y)}, not {sizes(ffn.output)}")
    _redirect_size_queries(ffn)
    ffn.output.replace_all_uses_with(y)
    for node in sorted(ffn.interior, reverse=True):
        graph.module.graph.erase_node(node)
    return y


def _redirect_size_queries(ffn: FFN) -> None:
    """Let what asks for a size of the hidden layer ask the FFN's input instead."""
    available = list(sizes(ffn.input) or ())
    for node in ffn.interior - {ffn.output}:
        for user in [u for u in node.users if u not in ffn.interior]:
            size = (sizes(node) or ())[user.args[1]]  # type: ignore[index]
            user.args = (ffn.input, available.index(size))
