"""A graph on disk: ``graph.json`` (nodes, specs, facts) and a safetensors file (tensors). No pickle, no code.

Only operators of the namespaces ``aten`` and ``dyncomp``, and a fixed list of Python operators on sizes, are read back:
a file cannot name any other function.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

import dyncomp.ops  # noqa: F401  registers the ops a graph may name
from dyncomp.errors import BundleError, GraphError
from dyncomp.graph import Graph, TensorSpec
from dyncomp.mapped import TensorStore, read_tensors, save_tensors
from dyncomp.quantized import Quantized, pack_nibbles, unpack_nibbles

FORMAT = 1
_NAMESPACES = ("aten", "dyncomp")
_PYTHON_OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.pow,
        operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
        torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_float, torch.sym_int, math.ceil, math.floor, math.trunc,
    )
}  # fmt: skip


def save_graph(graph: Graph, graph_file: Path, tensor_file: Path) -> None:
    """Write ``graph`` as JSON and its tensors beside it. Tensors that share storage are stored once.

    Raises:
        GraphError: the graph calls something that the format does not have.
    """
    tensors: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    by_storage: dict[tuple, str] = {}
    for name, value in graph.constants().items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in by_storage:
            alias[name] = by_storage[key]
        else:
            by_storage[key] = name
            tensors |= _quantized_parts(name, graph.quantized[name]) if name in graph.quantized else {name: value.detach().contiguous()}
    if len({t.data_ptr() for t in tensors.values() if t.numel()}) < sum(1 for t in tensors.values() if t.numel()):
        tensors = {name: t.clone() for name, t in tensors.items()}  # overlapping views
    document = write_structure(graph) | {
        "alias": alias,
        "quantized": {name: q.bits for name, q in graph.quantized.items() if name not in alias},
    }
    graph_file.write_text(json.dumps(document, indent=None, separators=(",", ":"), allow_nan=False) + "\n")
    save_tensors(tensors, tensor_file)


def write_structure(graph: Graph) -> dict[str, Any]:
    """Everything about ``graph`` but its tensors, as JSON-able data.

    Raises:
        GraphError: the graph calls something that the format does not have.
    """
    return {
        "format": FORMAT,
        "info": graph.info,
        "inputs": [{"name": s.name, "dtype": _dtype_name(s.dtype), "shape": list(s.shape)} for s in graph.inputs],
        "outputs": list(graph.outputs),
        "trainable": [n for n, t in graph.constants().items() if isinstance(t, torch.nn.Parameter)],
        "nodes": [_write_node(n) for n in graph.module.graph.nodes if n.op != "get_attr" or n.users],
    }


def read_structure(document: dict[str, Any], tensors: Mapping[str, Tensor], where: Path) -> Graph:
    """The graph that :func:`write_structure` described, over ``tensors``; shapes are inferred anew.

    Raises:
        BundleError: the document was written by a newer dyncomp, or names an unknown operator.
    """
    graph = _without_nodes(document, where)
    for name, value in tensors.items():
        graph.add_tensor(name, value, trainable=name in document["trainable"])
    _read_nodes(graph, document, where)
    return graph


def load_graph(graph_file: Path, tensor_file: Path, *, store: TensorStore | None = None) -> Graph:
    """Read what :func:`save_graph` wrote; shapes are inferred anew.

    Args:
        store: of the graph; its tensors then stay in the file, mapped, and must not be written to.

    Raises:
        BundleError: a file is missing or damaged, was written by a newer dyncomp, or names an unknown operator.
    """
    try:
        document = json.loads(graph_file.read_text())
        with safe_open(str(tensor_file), framework="pt") as file:
            tensors = read_tensors(tensor_file) if store is not None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename} is missing", hint="convert the model again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise BundleError(f"{graph_file.parent} holds a damaged graph: {error}", hint="convert the model again") from error
    graph, trainable = _without_nodes(document, graph_file), set(document["trainable"])
    graph.store = store
    for name, bits in document.get("quantized", {}).items():
        codes, scales, offsets = tensors.pop(f"{name}::codes"), tensors.pop(f"{name}::scales"), tensors.pop(f"{name}::offsets", None)
        graph.add_quantized(name, Quantized(unpack_nibbles(codes) if bits == 4 else codes, scales, offsets, bits))
    for name, value in tensors.items():
        graph.add_tensor(name, value, trainable=name in trainable)
    for name, source in document["alias"].items():
        graph.add_alias(name, source, trainable=name in trainable)
    _read_nodes(graph, document, graph_file)
    return graph


def _without_nodes(document: dict[str, Any], where: Path) -> Graph:
    if document.get("format") != FORMAT:
        raise BundleError(f"{where} has format {document.get('format')!r}; this dyncomp reads {FORMAT}", hint="update dyncomp")
    inputs = tuple(TensorSpec(s["name"], getattr(torch, s["dtype"]), tuple(s["shape"])) for s in document["inputs"])
    return Graph(fx.GraphModule(torch.nn.Module(), fx.Graph()), inputs, tuple(document["outputs"]), dict(document["info"]))


def _read_nodes(graph: Graph, document: dict[str, Any], where: Path) -> None:
    """Fill a graph that has its tensors."""
    nodes: dict[str, fx.Node] = {}
    for item in document["nodes"]:
        node = _read_node(graph.module.graph, item, nodes, where)
        node.meta["path"] = item.get("path", "")
        nodes[item["name"]] = node
    graph.module.graph.lint()
    graph.module.recompile()
    graph.infer_shapes()


def _quantized_parts(name: str, value: Quantized) -> dict[str, Tensor]:
    parts = {"codes": pack_nibbles(value.codes) if value.bits == 4 else value.codes, "scales": value.scales}
    if value.offsets is not None:
        parts["offsets"] = value.offsets
    return {f"{name}::{part}": tensor.contiguous() for part, tensor in parts.items()}


def _write_node(node: fx.Node) -> dict[str, Any]:
    item: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_name(node)}
    if node.op in ("call_function", "output"):
        item["args"] = [_write(a) for a in node.args]
    if node.kwargs:
        item["kwargs"] = {k: _write(v) for k, v in node.kwargs.items()}
    if path := node.meta.get("path"):
        item["path"] = path
    return item


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    name = getattr(target, "__name__", str(target))
    if _PYTHON_OPS.get(name) is target:
        return f"python.{name}"
    raise GraphError(f"the node {node.name!r} calls {target}, which a saved graph cannot name")


def _read_node(graph: fx.Graph, item: dict[str, Any], nodes: dict[str, fx.Node], where: Path) -> fx.Node:
    op, name = item["op"], item["name"]
    if op == "call_function":
        target: Any = _read_target(item["target"], where)
    elif op in ("placeholder", "get_attr", "output"):
        target = item["target"]
    else:
        raise BundleError(f"{where} has a node of kind {op!r}, which graphs do not have")
    try:
        args = tuple(_read(a, nodes) for a in item.get("args", []))
        kwargs = {k: _read(v, nodes) for k, v in item.get("kwargs", {}).items()}
    except (KeyError, AttributeError) as error:
        raise BundleError(f"{where}: node {name!r} refers to {error}, which is not there") from error
    return graph.create_node(op, target, args, kwargs, name=name)


def _read_target(name: str, where: Path) -> Any:
    namespace, _, rest = name.partition(".")
    try:
        if namespace == "python":
            return _PYTHON_OPS[rest]
        if namespace in _NAMESPACES:
            packet, overload = rest.rsplit(".", 1)
            return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (KeyError, AttributeError, ValueError):
        pass
    raise BundleError(f"{where} names the operator {name!r}, which this dyncomp does not know", hint="update dyncomp")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list | tuple):
        return [_write(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": _dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise GraphError(f"a saved graph cannot hold a {type(value).__name__}: {value!r}")


def _read(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, payload),) = value.items()
    if kind == "node":
        return nodes[payload]
    if kind == "float":
        return float(payload)
    if kind in ("dtype", "torch"):
        found = getattr(torch, payload)
        if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            raise KeyError(payload)
        return found
    if kind == "device":
        return torch.device(payload)
    if kind == "ellipsis":
        return Ellipsis
    raise KeyError(kind)
