"""Pass ``upcycle``: every FFN becomes several copies of itself, for training to make different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from dyncomp.passes.carve_experts import kept_dense
from dyncomp.passes.clustering import expert_size
from dyncomp.passes.layerwise import routing_facts
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Builder, Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import FFN, find_regions, replace_ffn
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.tokens import vocabulary_size
from dyncomp.routing import deepseek_v3, hash_table, top_k, tree

aten = torch.ops.aten
GATES = ("topk", "deepseek-v3", "tree", "hash")


@dataclass(frozen=True)
class Upcycle(Pass):
    """Copy each FFN into experts, with noise, under a random router whose weights sum to 1 (Sparse Upcycling, 2212.05055).

    before:  linear(x, gate) -> silu -\\
             linear(x, up) ------------*-> linear(., down)
    after:   gates = top_k(linear(x, router), k)                 # plain nodes, see dyncomp.routing
             dyncomp.routed_ffn(x, gates, w_up[E], w_down[E])    # copies of the FFN, or of its parts

    With ``parts`` experts are fine-grained: each holds a part of the FFN's neurons, the first ``shared`` parts run for every token, and the
    others are copied. The parts of a copy begin with the same router row, so that a token runs all of them, and part by training
    ("virtual groups", 2410.07524); weights are scaled by their number.

    Without noise the model computes what it did. It is larger and slower by itself: what it is for is ``heal``.
    """

    name: ClassVar[str] = "upcycle"

    experts: int = 8
    """E, of each FFN: its copies; with ``parts``, the shared parts and the copies of the others."""
    k: int = 2
    """Experts that each token runs, shared ones included."""
    parts: int = 1
    """What each FFN's neurons are divided into; must divide its width. A token that runs as many experts computes what the FFN did."""
    shared: int = 0
    """Of the parts, those that are not copied and run for every token."""
    noise: float = 0.01
    """Deviation of what is added to each copy's weights, times that of the weights."""
    gates: str = "topk"
    """``topk`` (softmax over the chosen: Mixtral; Switch with k=1), ``deepseek-v3`` (sigmoid, selection bias, best groups), ``tree`` (a
    router of groups, one within them), or ``hash`` (by token id)."""
    groups: int = 4
    """With ``deepseek-v3`` and ``tree``: groups of experts."""
    kept: int = 2
    """Of them, those that a token may use."""
    keep_dense: tuple[int, ...] = ()
    """Positions of FFNs to leave as they are (0 is the first; negative counts from the end)."""

    def __post_init__(self) -> None:
        if self.gates not in GATES:
            raise RequestError(f"upcycle: unknown gates {self.gates!r}", hint=f"use {', '.join(GATES)}")
        if self.experts < 2 or not 0 < self.k <= self.experts or not self.noise >= 0:
            raise RequestError(
                f"upcycle: {self.k} of {self.experts} experts, noise {self.noise:g}", hint="0 < k <= experts, experts >= 2, noise >= 0"
            )
        if not 0 <= self.shared < self.parts or (self.experts - self.shared) % self._copied or (self.k - self.shared) % self._copied:
            raise RequestError(
                f"upcycle: {self.k} of {self.experts} experts that are {self.parts} parts, {self.shared} of them shared",
                hint="experts - shared and k - shared must be multiples of parts - shared: whole copies; shared < parts",
            )
        if self._copies < 2 or self._running < 1:
            raise RequestError(
                f"upcycle: {self._running} of {self._copies} copies of {self._copied} parts run", hint="at least 1 of at least 2"
            )
        if self.gates in ("deepseek-v3", "tree") and (
            not 0 < self.kept <= self.groups or self._copies % self.groups or self.kept * (self._copies // self.groups) < self._running
        ):
            raise RequestError(
                f"upcycle: {self.k} of {self.experts} experts in {self.kept} of {self.groups} groups",
                hint="groups must divide the experts into whole copies, and the groups kept must hold as many as run",
            )

    @property
    def _copied(self) -> int:
        """Parts of a copy."""
        return self.parts - self.shared

    @property
    def _copies(self) -> int:
        return (self.experts - self.shared) // self._copied

    @property
    def _running(self) -> int:
        """Copies that a token runs at first."""
        return (self.k - self.shared) // self._copied

    def precheck(self, graph: Graph) -> None:
        ffns = find_regions(graph).require_ffns()
        for position, ffn in enumerate(ffns):
            if position not in kept_dense(self.keep_dense, len(ffns)):
                expert_size(ffn.d_ff, self.parts)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        ffns = find_regions(graph).ffns
        dense = kept_dense(self.keep_dense, len(ffns))
        result = PassResult(facts={"experts": self.experts, "k": self.k, "kept_dense": [ffns[i].name for i in sorted(dense)]})
        generator = torch.Generator().manual_seed(ctx.seed)
        for position, ffn in enumerate(ffns):
            ctx.progress("upcycle", position + 1, len(ffns))
            if position in dense:
                continue
            if self.gates == "hash" and (why := _without_ids(graph, ffn)):
                result.refused.append(Refusal(ffn.name, self.name, why, "use gates=topk"))
                continue
            copies = add_copies(graph, ffn, self._copies, self.noise, generator, parts=self.parts, shared=self.shared)
            router = self._router(graph, ffn, generator)

            def build(b: Builder, x: fx.Node, ffn: FFN = ffn, copies: Copies = copies, router: dict[str, fx.Node] = router) -> fx.Node:
                return copies.after(b, copies.call(b, x, self._gates(b, x, router)))

            replace_ffn(graph, ffn, build)
            routing_facts(graph, ffn.name).update(active=self.k / self.experts, copies=True, shared=self.shared)
            result.changed.append(ffn.name)
        return result

    def _router(self, graph: Graph, ffn: FFN, generator: torch.Generator) -> dict[str, fx.Node]:
        """Constants that the gates are made of."""
        linear = lambda rows: torch.randn(rows, ffn.d_model, generator=generator) / ffn.d_model**0.5  # noqa: E731
        each = linear(self._copies).repeat_interleave(self._copied, 0)
        tensors: dict[str, Tensor] = {"weight": torch.cat([torch.zeros(self.shared, ffn.d_model), each])}
        if self.gates == "hash":
            seed = int(torch.randint(1 << 30, (), generator=generator))
            table = hash_table(vocabulary_size(graph), self._copies, self._running, seed=seed).repeat_interleave(self._copied, 1)
            tensors = {"table": torch.cat([torch.ones(len(table), self.shared), table], 1)}
        elif self.gates == "deepseek-v3":
            tensors["bias"] = torch.zeros(self.experts)
        elif self.gates == "tree":
            tensors["coarse"] = linear(self.groups)
        for name, value in tensors.items():
            graph.add_tensor(f"{ffn.name}.router.{name}", value, trainable=self.gates != "hash")
        return {name: graph.read(f"{ffn.name}.router.{name}") for name in tensors}

    def _gates(self, b: Builder, x: fx.Node, router: dict[str, fx.Node]) -> fx.Node:
        if self.gates == "hash":
            return b.call(aten.embedding.default, router["table"], b.graph.placeholders[0])
        coarse = [b.call(aten.linear.default, x, router["coarse"])] if self.gates == "tree" else []
        scores = b.call(aten.linear.default, x, router["weight"])
        k, factor = self.k - self.shared, float(self._copied)
        if self.gates == "deepseek-v3":
            gates = partial(deepseek_v3, k=k, groups=self.groups, kept=self.kept, shared=self.shared, factor=factor)
            return b.inline(gates, scores, router["bias"])
        chosen = partial(tree, k=k, kept=self.kept) if self.gates == "tree" else partial(top_k, k=k)
        return b.inline(partial(_beside_shared, gates=chosen, shared=self.shared, factor=factor), *coarse, scores)


def _beside_shared(*scores: Tensor, gates: Callable[..., Tensor], shared: int, factor: float) -> Tensor:
    """``gates`` of the last scores' other experts, times ``factor``, behind ones for the ``shared`` first ones."""
    *before, last = scores
    found = gates(*before, last[..., shared:] if shared else last)
    found = found * factor if factor != 1 else found
    return torch.cat([torch.ones_like(last[..., :shared]), found], -1) if shared else found


def _without_ids(graph: Graph, ffn: FFN) -> str | None:
    """Why token ids do not tell the rows of an FFN's input apart, or None."""
    ids = graph.placeholders[0].meta["val"]
    if ids.is_floating_point() or vocabulary_size(graph, 0) == 0:
        return "the model does not read token ids"
    x = ffn.input.meta["val"]
    if x.dim() != ids.dim() + 1 or any(str(a) != str(b) for a, b in zip(x.shape, ids.shape, strict=False)):
        return "its input is not [batch, tokens, features] of the token ids"
    return None


@dataclass(frozen=True)
class Copies:
    """Copies of one FFN as constants of the graph; nodes."""

    w_up: fx.Node
    b_up: fx.Node | None
    w_down: fx.Node
    b_down: fx.Node | None
    activation: str

    def call(self, b: Builder, x: fx.Node, gates: fx.Node) -> fx.Node:
        return b.call(torch.ops.dyncomp.routed_ffn.default, x, gates, self.w_up, self.b_up, self.w_down, self.activation)

    def after(self, b: Builder, y: fx.Node) -> fx.Node:
        """With the bias of the down-projection, which is one for all copies."""
        return y if self.b_down is None else b.call(aten.add.Tensor, y, self.b_down)


def add_copies(graph: Graph, ffn: FFN, copies: int, noise: float, generator: torch.Generator, *, parts: int = 1, shared: int = 0) -> Copies:
    """Copies of an FFN's weights as experts, [E, …]; matrices with noise.

    Args:
        parts: of the neurons, each an expert of its own. shared: the first of them, which are there once and without noise; the others
            follow copy by copy, E = shared + copies * (parts - shared).
    """
    weights, prefix = ffn.weights(graph), f"{ffn.name}.experts"

    def copy(value: Tensor) -> Tensor:
        """[parts, …] -> [E, …]"""
        copied = value[shared:].repeat(copies, *[1] * (value.ndim - 1))
        if noise and value.ndim == 3:
            copied += noise * value.std() * torch.randn(copied.shape, generator=generator)
        return torch.cat([value[:shared], copied])

    def split(rows: Tensor) -> Tensor:
        """[n * F, …], n of them a neuron -> [parts, n * F / parts, …]"""
        return rows.reshape(-1, parts, ffn.d_ff // parts, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)

    tensors = {"w_up": copy(split(weights.w_up)), "w_down": copy(weights.w_down.unflatten(1, (parts, -1)).transpose(0, 1))}
    if weights.b_up is not None:
        tensors["b_up"] = copy(split(weights.b_up))
    if weights.b_down is not None:
        tensors["b_down"] = weights.b_down.clone()
    nodes = {}
    for name, value in tensors.items():
        graph.add_tensor(f"{prefix}.{name}", value)
        nodes[name] = graph.read(f"{prefix}.{name}")
    return Copies(nodes["w_up"], nodes.get("b_up"), nodes["w_down"], nodes.get("b_down"), ffn.activation)
