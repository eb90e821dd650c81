"""What a decoder would ask of a checkpoint's architecture: its sizes, and each thing about it that some architecture lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from dyncomp.regions.decoder import Decoder, RoutedWeights
from dyncomp.regions.ffn import FFN, FFNWeights
from dyncomp.regions.router import TopK
from dyncomp.regions.weighting import Weighting

T = TypeVar("T")


@dataclass(frozen=True)
class Routing:
    """The experts that all routed layers have alike.

    Attributes:
        experts, k: routed experts, and how many of them run for a token; shared ones not counted.
        width: hidden neurons of one; ``shared``: of all shared ones together.
        bias: some router has one.
        weighting: what gates follow from the scores.
    """

    experts: int
    k: int
    width: int
    shared: int
    bias: bool
    weighting: Weighting


@dataclass(frozen=True)
class Shape:
    """Attributes:
    heads, kv_heads, head_dim, scale, rotated: of every attention.
    qkv_bias, out_bias, ffn_bias: whether some layer has one there.
    head_norm: queries and keys are normalised, head by head.
    activation: of every FFN, gated.
    dense: positions of the layers whose FFN is not routed; ``dense_width``: its neurons (0 when there is none).
    routing: None when no layer is routed.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotated: int
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    head_norm: bool
    activation: str
    dense: tuple[int, ...]
    dense_width: int
    routing: Routing | None


def shape_of(decoder: Decoder) -> tuple[Shape | None, list[str]]:
    """The shape, and the reasons why no architecture holds this decoder, among them those for which there is no shape."""
    problems: list[str] = []
    layers, graph = decoder.layers, decoder.graph

    def one(values: Iterable[T], what: str, remedy: str = "") -> T:
        found = list(dict.fromkeys(values))
        if len(found) > 1:
            problems.append(f"{what} differ between layers ({', '.join(map(str, found[:4]))}){': ' + remedy if remedy else ''}")
        return found[0]

    for mask in dict.fromkeys(str(a.attention.mask) for a in layers):
        if mask != "causal":
            problems.append(f"an attention sees {mask}, not every token before")
    one(((a.heads, a.kv_heads, a.head_dim, a.scale) for a in (la.attention for la in layers)), "attention sizes")
    attention = layers[0].attention
    if attention.value_dim != attention.head_dim:
        problems.append(f"values have {attention.value_dim} features a head, keys {attention.head_dim}")
    if len({la.query_norm is None for la in layers} | {la.key_norm is None for la in layers}) > 1:
        problems.append("some queries and keys are normalised, others are not")
    if decoder.head.bias is not None:
        problems.append("the vocabulary head has a bias")
    dense = tuple(i for i, la in enumerate(layers) if isinstance(la.ffn, FFN))
    routed = {i: decoder.routed(la) for i, la in enumerate(layers) if i not in dense}
    activation = one((la.ffn.activation for la in layers), "activations")
    if not all(la.ffn.gated for la in layers):
        problems.append(f"its FFNs are not gated ({activation} of one up-projection)")
    widths = [layers[i].ffn.d_ff for i in dense] or [0]
    width = one(widths, "widths of the FFNs that are not routed", "prune-static{keep-dense=} gives one width")
    problems += dict.fromkeys(w.router for w in routed.values() if isinstance(w.router, str))
    routing = None
    if routed and all(isinstance(w.router, TopK) for w in routed.values()):
        experts, k, neurons, shared, weighting = one(map(_routing, routed.values()), "experts, k, shared experts or gates")
        routing = Routing(experts, k, neurons, shared, any(_routing_bias(w) for w in routed.values()), weighting)
    elif routed:
        return None, problems
    weights: list[FFNWeights | RoutedWeights] = [*(decoder.dense(layers[i]) for i in dense), *routed.values()]
    shape = Shape(
        attention.heads, attention.kv_heads, attention.head_dim, attention.scale, decoder.rope.rotated,
        qkv_bias=any(linear.bias is not None for la in layers for linear in (la.query, la.key, la.value)),
        out_bias=any((b := la.out.bias_vector(graph)) is not None and bool(b.any()) for la in layers),
        ffn_bias=any(b is not None and bool(b.any()) for w in weights for b in (w.b_up, w.b_down)),
        head_norm=layers[0].query_norm is not None, activation=activation, dense=dense, dense_width=width,
        routing=routing,
    )  # fmt: skip
    return shape, problems


def _routing(weights: RoutedWeights) -> tuple[int, int, int, int, Weighting]:
    router, width = weights.router, weights.w_down.shape[2]
    assert isinstance(router, TopK)
    return len(weights.w_up) - router.shared, router.k, width, router.shared * width, router.weighting


def _routing_bias(weights: RoutedWeights) -> bool:
    assert isinstance(weights.router, TopK)
    return weights.router.bias is not None and bool(torch.any(weights.router.bias != 0))
