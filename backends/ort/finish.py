"""The last steps on the ONNX model: names, unused outputs, expert branches."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.ort.experts import expand_experts
from dyncomp.backends.ort.gated import expand_gated

from dyncomp.graph import Graph


def finish(model: Any, graph: Graph) -> None:
    """Tidy an ``onnx_ir.Model`` in place."""
    import onnx_ir as ir

    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))
    for value, name in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = name
    expand_gated(model)
    expand_experts(model)
    for node in model.graph.all_nodes():
        if node.domain in ("com.microsoft", "dyncomp"):
            model.graph.opset_imports.setdefault(node.domain, 1)
            for output in node.outputs:  # an unused optional output costs a buffer: an empty name leaves it out
                if not output.uses() and not output.is_graph_output():
                    output.name = ""
    name_nodes(model)


def name_nodes(model: Any) -> None:
    """Name every node after the weights it reads, or those of what it computes on, as ``model.layers.0.mlp.up_proj/MatMul_12``.

    For people, and for profiles by region.
    """
    paths: dict[Any, str] = {}
    for index, node in enumerate(model.graph.all_nodes()):
        weights = [v.name for v in node.inputs if v is not None and v.is_initializer() and "." in (v.name or "")]
        inherited = [paths[v] for v in node.inputs if v in paths]
        path = weights[-1].rpartition(".")[0] if weights else next(iter(inherited), "")
        for output in node.outputs:
            paths[output] = path
        node.name = f"{path}/{node.op_type}_{index}" if path else f"{node.op_type}_{index}"
