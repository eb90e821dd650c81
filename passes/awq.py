"""Pass ``awq``: scale the inputs of linear layers so that rounding their weights costs least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from dyncomp.passes.gptq import gram_of
from dyncomp.passes.precisions import aliases
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.quantized import BLOCKS, round_to_nearest
from dyncomp.regions import Linear, find_linears, find_regions
from dyncomp.regions.linear import PRODUCTS
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.sweep import Sweep, fast_matmul, release_memory

aten = torch.ops.aten
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
STEPS = 20
"""Exponents that are tried, from 0 (no scale) to 1."""


@dataclass(frozen=True)
class AWQ(Pass):
    """Activation-aware scales (AWQ, 2306.00978): the weights that read large inputs are made larger, so that they are rounded less.

    Input j of a linear layer is divided by s_j, and column j of its weight multiplied: the model computes what it did. The division goes
    into what makes the input: the weight of a norm that only linear layers read, or the rows of the up-projection of a gated FFN before
    its down-projection. s is the mean magnitude of the inputs to the power of an exponent, for which the layers' outputs change least
    when their weights are rounded to nearest. ``quantize`` with the same ``bits``, ``block`` and ``symmetric`` is to follow.

    before:  x = rms_norm(r, g);      linear(x, W)
    after:   x = rms_norm(r, g / s);  linear(x, W * s)
    """

    name: ClassVar[str] = "awq"
    tolerance: ClassVar[float] = 1e-4

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    tokens: int = 4_096
    """Calibration tokens."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RequestError(f"awq: {self.bits} bits are not supported", hint="use bits=4 or bits=8")
        if self.block not in BLOCKS:
            raise RequestError(f"awq: the block {self.block} is not one of {', '.join(map(str, BLOCKS))}")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        fuse_rms_norms(graph)
        sites = [s for s in _sites(graph) if all(linear.in_features % self.block == 0 for linear in s.linears)]
        if not sites:
            raise RequestError("awq: no linear layer of the graph has inputs that can be scaled where they are made")
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(self.tokens))
        found: list[tuple[_Site, Tensor]] = []
        result = PassResult()
        exponents: dict[str, float] = {}
        with fast_matmul(), torch.no_grad():
            for position, site in enumerate(sites):
                inputs = [x.reshape(-1, x.shape[-1]) for x in sweep.advance(site.input)]
                exponent, scales = self._search(inputs, [linear.weight_matrix(graph).float() for linear in site.linears])
                found.append((site, scales))
                exponents[site.linears[0].weight] = exponent
                ctx.progress(self.name, position + 1, len(sites))
                release_memory(collect=False)
        for site, scales in found:  # at the end: the sweep goes on from values that were computed without
            site.scale(graph, scales)
            result.changed += [linear.weight for linear in site.linears]
        graph.clean()
        result.facts = {"bits": self.bits, "exponents": exponents}
        return result

    def _search(self, inputs: list[Tensor], weights: list[Tensor]) -> tuple[float, Tensor]:
        """(the best exponent, [K] scales)."""
        size = sum(map(len, inputs))
        magnitude = torch.stack([x.abs().sum(0) for x in inputs]).sum(0) / size
        gram = gram_of(inputs).float() / size  # ||X dᵀ||² = d (XᵀX) dᵀ
        best: tuple[float, float, Tensor] | None = None
        for step in range(STEPS):
            scales = (magnitude.clamp_min(1e-4 * float(magnitude.mean()) + torch.finfo(torch.float32).tiny)) ** (step / STEPS)
            scales = scales / (scales.max() * scales.min()).sqrt()
            loss = 0.0
            for w in weights:
                changed = round_to_nearest(w * scales, self.bits, self.block, symmetric=self.symmetric).decode() / scales - w
                loss += float(((changed @ gram) * changed).sum())
            if best is None or loss < best[0]:
                best = loss, step / STEPS, scales
        assert best is not None
        return best[1], best[2]


@dataclass(frozen=True)
class _Site:
    """Linear layers that read ``input``, and what makes it: a norm's node, or the linear layer whose outputs are its factors."""

    input: fx.Node
    linears: tuple[Linear, ...]
    maker: fx.Node | Linear

    def scale(self, graph: Graph, scales: Tensor) -> None:
        """Divide the inputs by ``scales`` [K], and let the weights make good for it."""
        for linear in self.linears:
            weight = graph.tensor(linear.weight).detach()
            graph.add_tensor(linear.weight, weight * (scales[:, None] if linear.transposed else scales))
        if isinstance(self.maker, Linear):
            weight = graph.tensor(self.maker.weight).detach()
            graph.add_tensor(self.maker.weight, weight / (scales if self.maker.transposed else scales[:, None]))
            if self.maker.bias is not None:
                graph.add_tensor(self.maker.bias, graph.tensor(self.maker.bias).detach() / scales)
            return
        source, shape, *rest = self.maker.args
        parts: list[Any] = rest + [None] * (2 - len(rest))
        biased = self.maker.target is aten.layer_norm.default
        for position in range(1 + biased):
            node = parts[position]
            if node is None and position == 1:  # no bias to scale
                continue
            value = torch.ones_like(scales) if node is None else graph.tensor(node).detach()
            name = f"awq.{self.maker.name}.{('weight', 'bias')[position]}"
            graph.add_tensor(name, value / scales)
            with graph.inserting(before=self.maker):
                parts[position] = graph.read(name)
        self.maker.args = (source, shape, *parts[: max(len(rest), 1)])


def _sites(graph: Graph) -> list[_Site]:
    """In graph order."""
    linears = find_linears(graph)
    readers = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
    by_input: dict[fx.Node, list[Linear]] = {}
    for linear in linears.values():
        by_input.setdefault(linear.input, []).append(linear)

    def owned(linear: Linear) -> bool:
        """Whether its weight may be changed: nothing else reads it."""
        plain = linear.axis == -1 and linear.nodes[0].target in PRODUCTS and linear.weight not in graph.quantized
        return plain and readers[linear.weight] == 1 and len(aliases(graph, linear.weight)) == 1

    def folds(source: fx.Node, group: list[Linear]) -> bool:
        """Whether a norm makes these inputs, for these layers alone."""
        if source.target not in _NORMS or len(source.args[1]) != 1 or not all(map(owned, group)):  # type: ignore[arg-type]
            return False
        constant = all(a.op == "get_attr" for a in source.args[2:4] if isinstance(a, fx.Node))
        return constant and set(source.users) == {linear.nodes[0] for linear in group}

    found = [_Site(source, tuple(group), source) for source, group in by_input.items() if folds(source, group)]
    for ffn in find_regions(graph).ffns:
        maker = ffn.ups[-1]
        exact = ffn.gated or ffn.activation == "relu"  # what scales a factor of the hidden neurons, scales them
        unshared = maker.bias is None or readers[maker.bias] == 1
        if exact and len(ffn.ups) == 1 + ffn.gated and owned(ffn.down) and owned(maker) and unshared:
            found.append(_Site(ffn.down.input, (ffn.down,), maker))
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda s: order[s.input])
