"""Pass ``quantize``: weights in 8 or 4 bits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.gptq import gptq
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden, keep_large
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.quantized import BLOCKS, Quantized, round_to_nearest
from dyncomp.regions import Linear, RoutedFFN, find_linears, find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.regions.linear import PRODUCTS, constant
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul, release_memory

aten = torch.ops.aten
_PRODUCTS = (*PRODUCTS, torch.ops.dyncomp.sparse_linear.default, torch.ops.dyncomp.gated_linear.default)


@dataclass(frozen=True)
class Quantize(Pass):
    """Keep the weights of linear layers, experts, embedding and vocabulary head in few bits.

    Routers, norms, biases and position tables are left alone. Run it last: a pass that replaces a weight makes it float again.

    before:  linear(x, W)                 after:  linear(x, decode(codes(W), scales(W)))
    """

    name: ClassVar[str] = "quantize"

    bits: int = 8
    """8 or 4."""
    block: int = 32
    """Weights of a row that share a scale (and an offset): 32, 64 or 128."""
    symmetric: bool = True
    method: str = "rtn"
    """``rtn`` rounds each weight to the nearest value; ``gptq`` lets the later columns make good for the earlier ones' rounding, by
    calibration inputs (2210.17323), each layer's as the quantized layers before it give them."""
    head_bits: int = 8
    """Bits of the embedding and the vocabulary head, when that is more than ``bits``."""
    activations: str = "int8"
    """``int8``: inputs of quantized weights are rounded to int8 in blocks of 32, as fast kernels need it; ``float``: they are not."""
    tokens: int = 16_384
    """Calibration tokens for ``gptq``."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head_bits not in (4, 8):
            raise RequestError(f"quantize: {self.bits} bits are not supported", hint="use bits=8 or bits=4")
        if self.block not in BLOCKS:
            raise RequestError(f"quantize: the block {self.block} is not one of {', '.join(map(str, BLOCKS))}")
        if self.method not in ("rtn", "gptq"):
            raise RequestError(f"quantize: unknown method {self.method!r}", hint="use rtn or gptq")
        if self.activations not in ("int8", "float"):
            raise RequestError(f"quantize: activations={self.activations} is not known", hint="use int8 or float")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        result = PassResult(facts={"bits": self.bits, "block": self.block, "method": self.method})
        before = graph.weight_bytes()
        if self.method == "gptq":
            self._gptq(graph, ctx, result)
        else:
            for target in self._targets(graph, result):
                self._store(graph, target, self._round(target.weight(graph), target.bits), result)
                release_memory(collect=False)
        if not result.changed:
            raise RequestError("quantize: the graph has no weight that can be quantized")
        graph.info["activations"] = self.activations
        head = find_regions(graph).head
        if head is not None and self.activations == "int8":  # a third of what int8 inputs cost is lost there, on one product a token
            graph.info["two_terms"] = [head.weight]
        result.facts |= {"bytes": graph.weight_bytes(), "bytes_before": before}
        return result

    # ---- what is quantized -----------------------------------------------------------------------------------------
    def _targets(self, graph: Graph, result: PassResult) -> list[_Target]:
        """The weights to quantize, in graph order, each once; notes those that cannot be."""
        regions = find_regions(graph)
        routers = {n for r in regions.routed for n in r.router} | {s.scores for s in find_skips(graph)}
        tables = {name for n in graph.nodes if n.target is aten.embedding.default and (name := _vocabulary_table(graph, n)) is not None}
        head = {regions.head.weight} if regions.head is not None else set()
        readers = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
        found: dict[str, _Target] = {}
        order = {node: i for i, node in enumerate(graph.nodes)}
        for linear in find_linears(graph).values():
            if linear.nodes[0] in routers or linear.weight in found:
                continue
            bits = max(self.bits, self.head_bits) if linear.weight in tables | head else self.bits
            if linear.axis != -1 or linear.nodes[0].target not in _PRODUCTS:
                result.refused.append(Refusal(linear.weight, self.name, "it is not the weight of a plain linear layer"))
            elif linear.transposed and readers[linear.weight] > 1:
                result.refused.append(Refusal(linear.weight, self.name, "it is stored transposed and read by several layers"))
            else:
                found[linear.weight] = _Target(linear.weight, order[linear.nodes[0]], bits, linear=linear)
        for routed in regions.routed:
            for name in (routed.w_up, routed.w_down):
                found[name] = _Target(name, order[routed.node], self.bits, routed=routed)
        for name in sorted(tables - set(found)):
            found[name] = _Target(name, 0, max(self.bits, self.head_bits))
        for name, target in list(found.items()):
            if name in found and (columns := target.columns(graph)) % self.block:
                remedy = f"choose --experts so that {self.block} divides the neurons of each" if target.routed is not None else ""
                what = f"blocks of {self.block} do not divide its {columns} input features"
                result.refused.append(Refusal(name, self.name, what, remedy))
                for other in (target.routed.w_up, target.routed.w_down) if target.routed is not None else (name,):
                    found.pop(other, None)  # experts are computed by one operator: both of their weights, or none
        return sorted(found.values(), key=lambda t: t.position)

    def _round(self, weight: Tensor, bits: int) -> Quantized:
        return round_to_nearest(weight, bits, self.block, symmetric=self.symmetric)

    def _store(self, graph: Graph, target: _Target, value: Quantized, result: PassResult) -> None:
        if target.linear is not None and target.linear.transposed:
            _store_by_rows(graph, target.linear)
        storage = graph.tensor(target.name).data_ptr()
        shared = [name for name, tensor in graph.constants().items() if tensor.data_ptr() == storage]
        graph.add_quantized(target.name, value)
        for name in shared:  # tied weights that go by two names
            if name != target.name:
                graph.add_alias(name, target.name)
        result.changed.append(target.name)

    # ---- GPTQ ------------------------------------------------------------------------------------------------------
    def _gptq(self, graph: Graph, ctx: Context, result: PassResult) -> None:
        targets = self._targets(graph, result)
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(self.tokens))
        done = 0
        with fast_matmul(), torch.no_grad():
            for source, thresholds, group in _by_input(targets):
                if source is None:
                    for t in group:
                        self._store(graph, t, self._round(t.weight(graph), t.bits), result)
                elif group[0].routed is not None:
                    self._gptq_experts(graph, group[0].routed, sweep, result)
                else:
                    inputs = sweep.advance(source)
                    if thresholds is not None:
                        inputs = [keep_large(x, graph.tensor(thresholds)) for x in inputs]
                    gram = _gram(x.reshape(-1, x.shape[-1]) for x in inputs)
                    for t in group:
                        value = gptq(t.weight(graph), gram, t.bits, self.block, symmetric=self.symmetric)
                        self._store(graph, t, value, result)
                release_memory(collect=False)
                done += len(group)
                ctx.progress(self.name, done, len(targets))

    def _gptq_experts(self, graph: Graph, routed: RoutedFFN, sweep: Sweep, result: PassResult) -> None:
        """Up: over all tokens; down: each expert over the tokens that run it."""
        gates = sweep.advance(routed.gates)
        inputs = sweep.values(routed.input)
        gram = _gram(x.reshape(-1, x.shape[-1]) for x in inputs)
        up = graph.tensor(routed.w_up).detach()
        value = gptq(up.flatten(0, 1), gram, self.bits, self.block, symmetric=self.symmetric)
        shape = up.shape[:2]
        offsets = None if value.offsets is None else value.offsets.unflatten(0, shape)
        value = Quantized(value.codes.unflatten(0, shape), value.scales.unflatten(0, shape), offsets, self.bits)
        self._store(graph, _Target(routed.w_up, 0, self.bits, routed=routed), value, result)
        up, bias = graph.tensor(routed.w_up).detach(), None if routed.b_up is None else graph.tensor(routed.b_up).detach()
        down = graph.tensor(routed.w_down).detach()
        experts, _, neurons = down.shape
        grams, rows = torch.zeros(experts, neurons, neurons), torch.zeros(experts)
        for x, gate in zip(inputs, gates, strict=True):
            flat = gate.reshape(-1, experts)
            h = expert_hidden(x.reshape(-1, x.shape[-1]), up, bias, neurons, routed.activation) * flat[..., None]
            h = h.transpose(0, 1)
            grams += h.transpose(1, 2) @ h
            rows += (flat != 0).sum(0)
        parts = []
        for e in range(experts):
            if rows[e] < 4 * neurons:  # too few tokens to trust: plain rounding harms nothing it has not seen
                parts.append(self._round(down[e], self.bits))
                result.facts.setdefault("rarely_used", []).append(f"{routed.name} expert {e}: {int(rows[e])} tokens")
            else:
                parts.append(gptq(down[e], grams[e], self.bits, self.block, symmetric=self.symmetric))
        codes, scales = torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts])
        offsets = None if self.symmetric else torch.stack([p.offsets for p in parts if p.offsets is not None])
        self._store(graph, _Target(routed.w_down, 0, self.bits, routed=routed), Quantized(codes, scales, offsets, self.bits), result)


@dataclass(frozen=True)
class _Target:
    """A weight to quantize: of a linear layer, of routed experts, or (neither) an embedding table."""

    name: str
    position: int
    bits: int
    linear: Linear | None = None
    routed: RoutedFFN | None = None

    def weight(self, graph: Graph) -> Tensor:
        """[..., N, K]."""
        return self.linear.weight_matrix(graph) if self.linear is not None else graph.tensor(self.name).detach()

    def columns(self, graph: Graph) -> int:
        return int(self.weight(graph).shape[-1])


def _by_input(targets: list[_Target]) -> Iterator[tuple[fx.Node | None, str | None, list[_Target]]]:
    """Neighbouring targets that read the same node above the same thresholds, together."""

    def source(target: _Target) -> tuple[fx.Node | None, str | None]:
        if target.linear is not None:
            return target.linear.input, target.linear.thresholds
        return (target.routed.node if target.routed is not None else None), None

    for (node, thresholds), group in itertools.groupby(targets, source):
        yield node, thresholds, list(group)


def _gram(blocks: Iterator[Tensor]) -> Tensor:
    total: Tensor | None = None
    for x in blocks:
        total = x.T @ x if total is None else total.addmm_(x.T, x)
    assert total is not None
    return total


def _vocabulary_table(graph: Graph, node: fx.Node) -> str | None:
    """The table that an embedding node looks the model's token ids up in, or None for position tables and the like."""
    index = node.args[1]
    found = constant(graph, node.args[0])
    is_ids = isinstance(index, fx.Node) and index.op == "placeholder" and str(index.target) == "input_ids"
    return found[0] if found is not None and is_ids else None


def _store_by_rows(graph: Graph, linear: Linear) -> None:
    """Spell a product with a weight stored [K, N] as ``linear(x, W)``, the name then standing for [N, K]."""
    node = linear.nodes[0]
    bias = node.args[0] if node.target is aten.addmm.default else None
    graph.add_tensor(linear.weight, linear.weight_matrix(graph).contiguous())
    weight = graph.read(linear.weight)
    weight.meta["val"] = graph.tensor(linear.weight)
    with graph.inserting(before=node, path=node.meta.get("path")) as b:
        arguments = (linear.input, weight) if bias is None else (linear.input, weight, bias)
        y = b.call(aten.linear.default, *arguments)
    node.replace_all_uses_with(y)
    graph.module.graph.erase_node(node)


PRECISIONS = {"int8": Quantize(bits=8), "int4": Quantize(bits=4, symmetric=False, method="gptq")}
"""What ``--quantize`` takes: int8 by rounding, which loses next to nothing, int4 by GPTQ, with offsets: weights that were 4-bit before
(a GGUF file's) come out as they were."""


def quantize_of(passes: Iterable[Pass]) -> Quantize | None:
    """The quantization among the passes, or None."""
    return next((p for p in passes if isinstance(p, Quantize)), None)
