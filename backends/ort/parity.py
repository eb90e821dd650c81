"""Hold a model lowered for ONNX Runtime against the graph it was lowered from."""

from __future__ import annotations

from typing import Any

from dyncomp.backends import parity as general
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel

from dyncomp.graph import Graph


def parity(graph: Graph, model: OrtModel, **options: Any) -> dict[str, Any]:
    """:func:`dyncomp.backends.parity.parity` with an ONNX Runtime session."""
    return general.parity(graph, model, decoder_for, backend="ort", **options)
