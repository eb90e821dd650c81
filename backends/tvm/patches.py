"""Convolutions over patches that do not overlap, as vision transformers begin with, as linear layers over gathered patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dyncomp.graph import Graph

aten = torch.ops.aten
_OPTIONS = {
    aten.conv1d.default: ("stride", "padding", "dilation", "groups"),
    aten.conv2d.default: ("stride", "padding", "dilation", "groups"),
    aten.convolution.default: ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
}


def select_patches(graph: Graph) -> None:
    """A convolution whose stride is its kernel's size, on constant weights and images of a constant size.

    before:  conv2d(x [B, C, H p, W p], w [N, C, p, p], b)                           [B, N, H, W]
    after:   permute(linear(reshape(permute(x)) [B, H, W, C p p], w [N, C p p], b))  [B, N, H, W]
    """
    for node in graph.nodes:
        if node.target not in _OPTIONS or not _of_patches(node):
            continue
        x, weight, bias = [*node.args, None][:3]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        kernel, value = weight.meta["val"].shape[2:], graph.tensor(weight).detach()
        axes, channels = len(kernel), int(value.shape[1])
        counts = [int(size) // k for size, k in zip(x.meta["val"].shape[2:], kernel, strict=True)]
        name = f"{weight.target}_patches"
        if not graph.reads(name):
            graph.add_tensor(name, value.flatten(1).contiguous())
        cut = [-1, channels, *(n for pair in zip(counts, kernel, strict=True) for n in pair)]
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        with graph.inserting(before=node) as b:
            patches = b.call(aten.permute.default, b.call(aten.reshape.default, x, cut), order)
            rows = b.call(aten.reshape.default, patches, [-1, *counts, channels * math.prod(kernel)])
            y = b.call(aten.linear.default, rows, graph.read(name), *([] if bias is None else [bias]))
            y = b.call(aten.permute.default, y, [0, axes + 1, *range(1, axes + 1)])
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


def _of_patches(node: fx.Node) -> bool:
    x, weight, bias = [*node.args, None][:3]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return False
    value, kernel = x.meta["val"], list(weight.meta["val"].shape[2:])
    options: dict[str, Any] = dict(zip(_OPTIONS[node.target], node.args[3:], strict=False))  # type: ignore[index]

    def given(name: str, absent: int) -> list[Any]:
        found = options.get(name, absent)
        return list(found) * (len(kernel) // len(found)) if isinstance(found, list | tuple) else [found] * len(kernel)

    plain = given("padding", 0) == [0] * len(kernel) and given("dilation", 1) == [1] * len(kernel)
    plain = plain and options.get("groups", 1) == 1 and not options.get("transposed", False)
    whole = all(isinstance(s, int) and s % k == 0 for s, k in zip(value.shape[2:], kernel, strict=False))
    return plain and value.dim() == len(kernel) + 2 and value.dtype == torch.float32 and given("stride", 1) == kernel and whole
