"""The last steps on the ONNX model: names of dimensions, unused outputs, expert branches."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.ort.experts import expand_experts
from dyncomp.graph import Graph


def finish(model: Any, graph: Graph) -> None:
    """Tidy an ``onnx_ir.Model`` in place."""
    import onnx_ir as ir

    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))
    for value, name in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = name
    expand_experts(model)
    for node in model.graph.all_nodes():
        if node.domain == "com.microsoft":
            model.graph.opset_imports.setdefault("com.microsoft", 1)
            for output in node.outputs:  # an unused optional output costs a buffer: an empty name leaves it out
                if not output.uses() and not output.is_graph_output():
                    output.name = ""
