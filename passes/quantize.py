"""Pass ``quantize``: weights in 8 or 4 bits."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.awq import AWQ
from dyncomp.passes.gptq import gated_hidden, gptq, gram_of
from dyncomp.passes.precisions import FLOAT, Mix, Trials, Unit, aliases, choose, require_reachable
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.ops import keep_large
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.quantized import BLOCKS, Quantized, round_to_nearest
from dyncomp.regions import Head, Linear, RoutedFFN, find_linears, find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.regions.linear import LAYERS, common_path, constant
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul, release_memory

aten = torch.ops.aten


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
    screen: float = 0.0
    """Read the lower halves of the vocabulary head's 8-bit codes only where a token's logit by the upper halves comes within this many nats
    of its largest (:func:`dyncomp.interpret.screened`): 12 reads 6 % of SmolLM2's rows and costs 0.3 % in perplexity. 0: read them all."""
    tokens: int = 16_384
    """Calibration tokens for ``gptq``."""
    mixed: tuple[int, ...] = ()
    """Bits to choose from for each region by itself, as ``4+8``, in place of ``bits`` and ``head-bits``; 32 leaves a region in float. A
    region is an FFN, the linear layers that share an input (query, key and value), the embedding, the head: what one kernel reads.
    Each is rounded alone to each of these, and the loss measured at the end of the model: the KL divergence to the model as it was, in
    nats a token, or without next-token predictions the squared relative error of the outputs."""
    mean: float = 0.0
    """With ``mixed``: mean bits of these weights as a file holds them, scales and offsets included; the mix that loses least."""
    max_loss: float = 0.01
    """With ``mixed`` and no ``mean``: the smallest mix that loses at most this, measured with all regions rounded."""
    windows: int = 2
    """Calibration windows that losses are measured on, the last ones."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head_bits not in (4, 8):
            raise RequestError(f"quantize: {self.bits} bits are not supported", hint="use bits=8 or bits=4")
        if self.block not in BLOCKS:
            raise RequestError(f"quantize: the block {self.block} is not one of {', '.join(map(str, BLOCKS))}")
        if self.method not in ("rtn", "gptq"):
            raise RequestError(f"quantize: unknown method {self.method!r}", hint="use rtn or gptq")
        if self.activations not in ("int8", "float"):
            raise RequestError(f"quantize: activations={self.activations} is not known", hint="use int8 or float")
        if self.screen < 0 or (self.screen and (self.head_bits != 8 or self.activations != "int8")):
            raise RequestError(
                f"quantize: screen={self.screen:g} needs a head of 8 bits and int8 activations",
                hint="a positive margin in nats, head-bits=8 and activations=int8",
            )
        if not set(self.mixed) <= {4, 8, FLOAT} or len(self.mixed) == 1 or len(set(self.mixed)) < len(self.mixed):
            raise RequestError(
                f"quantize: mixed={'+'.join(map(str, self.mixed))} is no choice of precisions", hint=f"use mixed=4+8 or mixed=4+8+{FLOAT}"
            )
        if (self.mean or self.max_loss != 0.01) and not self.mixed:
            raise RequestError("quantize: mean and max-loss choose among several precisions", hint="add mixed=4+8")
        if self.mixed and self.mean:
            low, high = self.stored(min(self.mixed)), self.stored(max(self.mixed))
            if not low <= self.mean <= high:
                raise RequestError(
                    f"quantize: mean={self.mean:g} is not between {low:g} and {high:g}, what the smallest and the largest precision take",
                    hint="scales and offsets count: symmetric=true or a larger block spares some",
                )
        if self.max_loss <= 0 or self.windows < 1:
            raise RequestError("quantize: max-loss must be positive, and windows at least 1")

    @property
    def label(self) -> str:
        """``int8``, ``int4`` or ``mixed``."""
        return "mixed" if self.mixed else f"int{self.bits}"

    def uniform(self) -> Quantize:
        """The same with one precision for all regions, the smallest of the mix, rounded: it needs no text."""
        bits = min(self.mixed, default=self.bits)
        return dataclasses.replace(self, method="rtn", mixed=(), mean=0.0, max_loss=type(self).max_loss, bits=bits)

    def sketch(self, kind: str) -> Pass | None:
        return self.uniform()

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        result = PassResult(facts={"bits": self.mixed or self.bits, "block": self.block, "method": self.method})
        before = graph.weight_bytes()
        bits = self._mix(graph, ctx, result) if self.mixed else {}
        targets = [dataclasses.replace(t, bits=bits.get(t.name, t.bits)) for t in self._targets(graph, result)]
        if not targets:
            raise RequestError("quantize: the graph has no weight that can be quantized")
        targets = [t for t in targets if t.bits != FLOAT]
        if self.method == "gptq":
            self._gptq(graph, ctx, result, targets)
        else:
            for target in targets:
                self._store(graph, target, self._round(target.weight(graph), target.bits), result)
                release_memory(collect=False)
        head = find_regions(graph).head
        _note_activations(graph, head, self.activations)
        self._note_screen(graph, head, result)
        result.facts |= {"bytes": graph.weight_bytes(), "bytes_before": before}
        return result

    def _note_screen(self, graph: Graph, head: Head | None, result: PassResult) -> None:
        graph.info.pop("screened", None)
        if not self.screen:
            return
        if head is None:
            result.refused.append(Refusal("the vocabulary head", self.name, "there is none to screen"))
            return
        name = head.weight
        readers = {node.target for node in graph.nodes for argument in node.all_input_nodes if argument.target == name}
        if name not in graph.quantized or graph.quantized[name].bits != 8 or not readers <= {aten.linear.default, aten.embedding.default}:
            result.refused.append(Refusal(name, self.name, "screen is for a head of 8 bits that linear layers and embeddings read"))
            return
        graph.info["screened"] = {name: self.screen}

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
            if linear.axis != -1 or linear.nodes[0].target not in LAYERS:
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
        shared = aliases(graph, target.name)
        graph.add_quantized(target.name, value)
        for name in shared:  # tied weights that go by two names
            if name != target.name:
                graph.add_alias(name, target.name)
        result.changed.append(target.name)

    # ---- a precision for each region -------------------------------------------------------------------------------
    def _mix(self, graph: Graph, ctx: Context, result: PassResult) -> dict[str, int]:
        """The bits of each weight; what they were chosen by goes into the facts and into ``graph.info["precisions"]``."""
        work = graph.copy()
        for target in self._targets(work, PassResult()):
            if target.linear is not None and target.linear.transposed:
                _store_by_rows(work, target.linear)
        units = _units(work, self._targets(work, PassResult()))
        _note_activations(work, find_regions(work).head, self.activations)
        if not units:
            return {}
        windows = ctx.need_calibration("quantize{mixed}").windows()[-self.windows :]
        choices = sorted(self.mixed)
        with torch.no_grad():
            trials = Trials(work, lambda name, bits: self._round(work.tensor(name).detach(), bits), windows)
            if not self.mean:
                require_reachable(trials, units, choices, self.max_loss)
            losses = trials.each(units, choices, ctx.progress)
            mix = choose(trials, units, losses, self.stored, mean=self.mean or None, limit=self.max_loss)
        _note_mix(graph, result, units, losses, mix)
        result.facts["windows"] = len(windows)
        return {name: mix.bits[unit.name] for unit in units for name in unit.weights}

    def stored(self, bits: int) -> float:
        """Bits of a weight as a file holds it."""
        return float(bits) if bits == FLOAT else bits + (16 if self.symmetric else 32) / self.block

    # ---- GPTQ ------------------------------------------------------------------------------------------------------
    def _gptq(self, graph: Graph, ctx: Context, result: PassResult, targets: list[_Target]) -> None:
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(self.tokens))
        done = 0
        with fast_matmul(), torch.no_grad():
            for source, thresholds, group in _by_input(targets):
                if source is None:
                    for t in group:
                        self._store(graph, t, self._round(t.weight(graph), t.bits), result)
                elif group[0].routed is not None:
                    self._gptq_experts(graph, group[0].routed, group[0].bits, sweep, result)
                else:
                    inputs = sweep.advance(source)
                    if thresholds is not None:
                        inputs = [keep_large(x, graph.tensor(thresholds)) for x in inputs]
                    gram = gram_of(x.reshape(-1, x.shape[-1]) for x in inputs)
                    for t in group:
                        value = gptq(t.weight(graph), gram, t.bits, self.block, symmetric=self.symmetric)
                        self._store(graph, t, value, result)
                release_memory(collect=False)
                done += len(group)
                ctx.progress(self.name, done, len(targets))

    def _gptq_experts(self, graph: Graph, routed: RoutedFFN, bits: int, sweep: Sweep, result: PassResult) -> None:
        """Up: over all tokens; down: each expert over the tokens that run it."""
        gates = sweep.advance(routed.gates)
        inputs = sweep.values(routed.input)
        gram = gram_of(x.reshape(-1, x.shape[-1]) for x in inputs)
        up = graph.tensor(routed.w_up).detach()
        value = gptq(up.flatten(0, 1), gram, bits, self.block, symmetric=self.symmetric)
        shape = up.shape[:2]
        offsets = None if value.offsets is None else value.offsets.unflatten(0, shape)
        value = Quantized(value.codes.unflatten(0, shape), value.scales.unflatten(0, shape), offsets, bits)
        self._store(graph, _Target(routed.w_up, 0, bits, routed=routed), value, result)
        down = graph.tensor(routed.w_down).detach()
        experts, _, neurons = down.shape
        grams, rows = torch.zeros(experts, neurons, neurons), torch.zeros(experts)
        for h, active in gated_hidden(graph, routed, inputs, gates):
            grams += h.transpose(1, 2) @ h
            rows += active.sum(0)
        parts = []
        for e in range(experts):
            if rows[e] < 4 * neurons:  # too few tokens to trust: plain rounding harms nothing it has not seen
                parts.append(self._round(down[e], bits))
                result.facts.setdefault("rarely_used", []).append(f"{routed.name} expert {e}: {int(rows[e])} tokens")
            else:
                parts.append(gptq(down[e], grams[e], bits, self.block, symmetric=self.symmetric))
        codes, scales = torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts])
        offsets = None if self.symmetric else torch.stack([p.offsets for p in parts if p.offsets is not None])
        self._store(graph, _Target(routed.w_down, 0, bits, routed=routed), Quantized(codes, scales, offsets, bits), result)


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


def _note_activations(graph: Graph, head: Head | None, activations: str) -> None:
    graph.info["activations"] = activations
    if head is not None and activations == "int8":  # a third of what int8 inputs cost is lost there, on one product a token
        graph.info["two_terms"] = [head.weight]


def _units(graph: Graph, targets: list[_Target]) -> list[Unit]:
    """Targets by what reads them: an FFN, linear layers of one input, or one weight."""
    regions = find_regions(graph)
    inside = {linear.weight: f.name for f in (*regions.ffns, *regions.sparse_ffns) for linear in (*f.ups, f.down)}
    inside |= {name: r.name for r in regions.routed for name in (r.w_up, r.w_down)}
    head = regions.head.weight if regions.head is not None else None
    groups: dict[object, list[_Target]] = {}
    for target in targets:
        source = target.linear.input if target.linear is not None and target.name not in inside else target.name
        groups.setdefault(inside.get(target.name, source), []).append(target)
    found: dict[str, Unit] = {}
    for key, group in groups.items():
        nodes = [t.linear.nodes[0] for t in group if t.linear is not None]
        path = key if isinstance(key, str) else common_path(nodes)
        name = group[0].name if not path or path in found or group[0].name == head else path
        weights = tuple(t.name for t in group)
        found[name] = Unit(name, weights, sum(graph.tensor(w).numel() for w in weights))
    return list(found.values())


def _note_mix(graph: Graph, result: PassResult, units: list[Unit], losses: Mapping[str, Mapping[int, float]], mix: Mix) -> None:
    regions = {
        unit.name: {"bits": mix.bits[unit.name], "weights": unit.size, "loss": {str(b): loss for b, loss in losses[unit.name].items()}}
        for unit in units
    }
    figures = {"mean_bits": mix.stored, "predicted_loss": mix.predicted, "loss": mix.measured}
    graph.info["precisions"] = {"regions": regions} | figures
    result.facts |= {"precisions": regions} | figures


def _by_input(targets: list[_Target]) -> Iterator[tuple[fx.Node | None, str | None, list[_Target]]]:
    """Neighbouring targets that read the same node above the same thresholds, together."""

    def source(target: _Target) -> tuple[fx.Node | None, str | None]:
        if target.linear is not None:
            return target.linear.input, target.linear.thresholds
        return (target.routed.node if target.routed is not None else None), None

    for (node, thresholds), group in itertools.groupby(targets, source):
        yield node, thresholds, list(group)


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


PRECISIONS: dict[str, tuple[Pass, ...]] = {
    "int8": (Quantize(bits=8),),
    "int4": (AWQ(symmetric=False), Quantize(bits=4, symmetric=False, method="gptq")),
    "mixed": (AWQ(symmetric=False), Quantize(mixed=(4, 8), symmetric=False, method="gptq")),
}
"""What ``--quantize`` takes: int8 by rounding, which loses next to nothing; int4 by AWQ's scales and GPTQ, with offsets: weights that were
4-bit before (a GGUF file's) come out as they were; or int4 where it costs little, int8 elsewhere."""


def quantize_of(passes: Iterable[Pass]) -> Quantize | None:
    """The quantization among the passes, or None."""
    return next((p for p in passes if isinstance(p, Quantize)), None)


def quantization_of(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """The quantization among the passes and what prepares the weights for it, in order; none where there is no quantization."""
    found = tuple(p for p in passes if isinstance(p, AWQ | Quantize))
    return found if quantize_of(found) is not None else ()
