"""Routing that looks at all tokens of a sequence: where it is possible."""

from __future__ import annotations

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.regions import FFN, RoutedFFN


def refuse_decoders(
    graph: Graph, what: str, hint: str = "a threshold fitted to the same share is its causal predictor: fit-router{gates=threshold}"
) -> None:
    """Raises RequestError: the graph predicts tokens, and whether a token runs an expert would depend on those after it."""
    if graph.info.get("task") in WRITES:
        raise RequestError(f"{what} looks at tokens that a decoder has not seen yet", hint=hint)


def require_sequences(region: FFN | RoutedFFN, what: str) -> None:
    """Raises RequestError: the region's input is not [batch, tokens, features]."""
    if (rank := region.input.meta["val"].dim()) != 3:
        raise RequestError(
            f"{what}: {region.name} reads a tensor of {rank} dimensions, not [batch, tokens, features]", hint="use a threshold"
        )
