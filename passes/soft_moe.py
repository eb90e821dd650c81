"""Pass ``soft-moe``: experts compute mixtures of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.across_tokens import refuse_decoders, require_sequences
from dyncomp.passes.carve_experts import kept_dense
from dyncomp.passes.layerwise import routing_facts
from dyncomp.passes.upcycle import Copies, add_copies
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Builder, Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import find_regions, replace_ffn
from dyncomp.routing import soft

aten = torch.ops.aten


@dataclass(frozen=True)
class SoftMoE(Pass):
    """Copies of each FFN compute slots, mixtures of all tokens; tokens get mixtures of what they give (2308.00951). Encoders only.

    before:  y = ffn(x)                                                             # [B, S, d]
    after:   dispatch, combine = soft(linear(unit(x), slots))                       # [B, S, P], softmax over S and over P
             y = combine @ dyncomp.routed_ffn(dispatchᵀ @ x, one expert a slot, …)  # P slots instead of S tokens

    The slots' gates are fixed: to a backend this is a routed FFN of P tokens. What it computes depends on P, not on the length of the
    sequence. It is far from the dense model until it is healed.
    """

    name: ClassVar[str] = "soft-moe"

    experts: int = 8
    """E, copies of each FFN."""
    slots: int = 4
    """Mixtures that each expert computes."""
    noise: float = 0.01
    """Deviation of what is added to each copy's weights, times that of the weights."""
    sharpness: float = 8.0
    """Factor of the cosines between tokens and slots, trained on."""
    keep_dense: tuple[int, ...] = ()
    """Positions of FFNs to leave as they are (0 is the first; negative counts from the end)."""

    def __post_init__(self) -> None:
        if self.experts < 1 or self.slots < 1 or not self.noise >= 0:
            raise RequestError(f"soft-moe: {self.experts} experts of {self.slots} slots, noise {self.noise:g}", hint="at least one of each")

    def precheck(self, graph: Graph) -> None:
        refuse_decoders(graph, self.name)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        refuse_decoders(graph, self.name)
        ffns = find_regions(graph).ffns
        dense = kept_dense(self.keep_dense, len(ffns))
        result = PassResult(facts={"experts": self.experts, "kept_dense": [ffns[i].name for i in sorted(dense)]})
        generator = torch.Generator().manual_seed(ctx.seed)
        for position, ffn in enumerate(ffns):
            ctx.progress(self.name, position + 1, len(ffns))
            if position in dense:
                continue
            require_sequences(ffn, self.name)
            copies = add_copies(graph, ffn, self.experts, self.noise, generator)
            directions = torch.randn(self.experts * self.slots, ffn.d_model, generator=generator)
            directions *= self.sharpness / directions.norm(dim=1, keepdim=True)
            constants = {"slots": directions, "gates": torch.eye(self.experts).repeat_interleave(self.slots, 0)}
            for name, value in constants.items():
                graph.add_tensor(f"{ffn.name}.router.{name}", value, trainable=name == "slots")
            slots, gates = (graph.read(f"{ffn.name}.router.{name}") for name in constants)

            def build(b: Builder, x: fx.Node, copies: Copies = copies, slots: fx.Node = slots, gates: fx.Node = gates) -> fx.Node:
                dispatch, combine = b.inline(soft, b.call(aten.linear.default, b.inline(_unit, x), slots))
                mixed = b.call(aten.matmul.default, b.call(aten.transpose.int, dispatch, -1, -2), x)  # [B, P, d]
                given = copies.call(b, mixed, b.inline(_for_each, mixed, gates))
                return copies.after(b, b.call(aten.matmul.default, combine, given))

            replace_ffn(graph, ffn, build)
            routing_facts(graph, ffn.name).update(active=1 / self.experts, copies=True)
            result.changed.append(ffn.name)
        return result


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def _for_each(slots: Tensor, gates: Tensor) -> Tensor:
    """The same gates in each row of the batch: [B, P, d], [P, E] -> [B, P, E]."""
    return torch.zeros_like(slots.narrow(-1, 0, 1)) + gates
