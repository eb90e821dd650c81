"""The intermediate representation: a flat FX graph at ATen level, with names, symbolic shapes and provenance.

A :class:`Graph` wraps the ``torch.fx.GraphModule`` that ``torch.export`` produced. Every node keeps

* ``meta["val"]`` — a fake tensor: dtype and shape, where the dynamic dimensions are symbolic;
* ``meta["path"]`` — the module path it came from (``model.layers.3.mlp``), for people, never for decisions.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from dyncomp.errors import GraphError, RequestError
from dyncomp.interpret import Interpreter, rounds_activations
from dyncomp.mapped import TensorStore, is_mapped
from dyncomp.quantized import Quantized

_DTYPE_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A graph input: its name, dtype and shape; a string in the shape names a dynamic dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {_DTYPE_SHORT[self.dtype]}[{', '.join(map(str, self.shape))}]"


@dataclass
class Graph:
    """A traced model.

    Args:
        module: flat graph module; placeholders in the order of ``inputs``, output a tuple in the order of ``outputs``.
        inputs: what the graph takes.
        outputs: the names of what it returns.
        info: plain facts that travel with the graph (``name``, ``task``, ``context_length``, passes that ran …).
        quantized: codes and scales of the weights that are kept in few bits, by name. The module holds their decoded values, so
            every graph runs in PyTorch and is analysed like any other; backends and files use the codes.
        store: where new tensors are put, for models that memory does not hold; None keeps them in memory.
        encoder: of the decoder of an encoder–decoder with a KV cache: what runs once before it. Its outputs are inputs of this graph, by
            name. Such graphs are lowered, not stored.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    quantized: dict[str, Quantized] = field(default_factory=dict)
    store: TensorStore | None = None
    encoder: Graph | None = None

    # -- running -------------------------------------------------------------------------------------------------
    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the graph; one output is returned bare, several as a tuple."""
        if rounds_activations(self) or self.store is not None:
            result = Interpreter(self).run(*self._bind(args, kwargs))
        else:
            result = self.module(*self._bind(args, kwargs))
        return result[0] if len(self.outputs) == 1 else result

    def _bind(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
        names = [spec.name for spec in self.inputs]
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or set(given) != set(names):
            raise RequestError(f"the graph takes the inputs {names}, got {len(args)} positional and {sorted(kwargs)}")
        return [given[name] for name in names]

    # -- reading -------------------------------------------------------------------------------------------------
    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @property
    def output_nodes(self) -> list[fx.Node]:
        return list(self._output.args[0])  # type: ignore[arg-type]

    @property
    def _output(self) -> fx.Node:
        return next(n for n in reversed(self.module.graph.nodes) if n.op == "output")

    def tensor(self, node: fx.Node | str) -> Tensor:
        """The parameter, buffer or constant that a ``get_attr`` node (or its dotted name) reads."""
        target = node if isinstance(node, str) else str(node.target)
        try:
            value: Tensor = operator.attrgetter(target)(self.module)
        except AttributeError:
            raise GraphError(f"the graph reads {target!r}, which its module does not have") from None
        return value

    def reads(self, name: str) -> bool:
        """Whether some node reads the tensor ``name``."""
        return any(n.op == "get_attr" and n.target == name for n in self.module.graph.nodes)

    def constants(self) -> dict[str, Tensor]:
        """Every tensor that some node reads, by dotted name, in graph order."""
        return {str(n.target): self.tensor(n) for n in self.module.graph.nodes if n.op == "get_attr" and n.users}

    def parameter_count(self) -> int:
        """Number of distinct weights the graph reads (tied weights count once; tables and masks are not weights)."""
        seen = {(id(t) if t.is_meta else t.data_ptr()): t.numel() for t in self.constants().values() if isinstance(t, torch.nn.Parameter)}
        return sum(seen.values())

    # -- writing -------------------------------------------------------------------------------------------------
    def add_tensor(self, name: str, value: Tensor, *, trainable: bool = True) -> None:
        """Register ``value`` under the dotted ``name`` (a parameter when it is floating point and trainable).

        A weight of that name that was quantized no longer is.
        """
        self.quantized.pop(name, None)
        value = self._stored(value)
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self.module
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                child = torch.nn.Module()
                owner.add_module(part, child)
            owner = child
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        if trainable and value.is_floating_point():
            owner.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(leaf, value)

    def add_quantized(self, name: str, value: Quantized) -> None:
        """Register a weight by its codes; the module gets the decoded values."""
        self.add_tensor(name, value.decode())
        offsets = None if value.offsets is None else self._stored(value.offsets)
        self.quantized[name] = Quantized(self._stored(value.codes), self._stored(value.scales), offsets, value.bits)

    def _stored(self, value: Tensor) -> Tensor:
        return value if self.store is None else self.store.put(value)

    def keep_in(self, store: TensorStore) -> None:
        """Put the tensors, and those that are added from now on, into a store."""
        self.store = store
        for name, value in self.constants().items():
            if not is_mapped(value):
                self.add_tensor(name, value.detach(), trainable=isinstance(value, torch.nn.Parameter))

    def add_alias(self, name: str, source: str, *, trainable: bool = True) -> None:
        """Let ``name`` stand for the tensor ``source`` too, quantized or not; the values are shared."""
        self.add_tensor(name, self.tensor(source).detach(), trainable=trainable)
        if source in self.quantized:
            self.quantized[name] = self.quantized[source]

    def weight_bytes(self) -> int:
        """Bytes of all weights as a file holds them: codes and scales where a weight is quantized."""
        seen = {t.data_ptr(): (name, t) for name, t in self.constants().items() if isinstance(t, torch.nn.Parameter)}
        return sum(self.quantized[n].bytes if n in self.quantized else t.numel() * t.element_size() for n, t in seen.values())

    @property
    def precision(self) -> str:
        """``int8``, ``int4`` or ``fp32``: what most of the quantized weights are kept in; ``mixed`` where each region has its own."""
        if len({region["bits"] for region in self.info.get("precisions", {}).get("regions", {}).values()}) > 1:
            return "mixed"
        sizes = collections.Counter({8: 0, 4: 0})
        for value in self.quantized.values():
            sizes[value.bits] += value.codes.numel()
        bits, largest = sizes.most_common(1)[0]
        return f"int{bits}" if largest else "fp32"

    def read(self, name: str) -> fx.Node:
        """A ``get_attr`` node for the tensor ``name``, made at the top of the graph unless there is one."""
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        first = next(iter(self.module.graph.nodes))
        with self.module.graph.inserting_before(first):
            node = self.module.graph.create_node("get_attr", name, name=_identifier(name))
        node.meta["val"] = self.tensor(name)
        return node

    @contextlib.contextmanager
    def inserting(self, *, before: fx.Node | None = None, after: fx.Node | None = None, path: str | None = None) -> Iterator[Builder]:
        """Insert nodes at one place; the builder fills in their shapes and provenance."""
        anchor = before if before is not None else after
        assert anchor is not None
        graph = self.module.graph
        with graph.inserting_before(anchor if before is not None else anchor.next):  # inserting_after would turn the order of calls round
            yield Builder(self, path if path is not None else anchor.meta.get("path", ""))

    def copy(self) -> Graph:
        """A graph whose nodes and facts may be changed freely; the tensors are shared with this one."""
        module = fx.GraphModule(self.module, fx.Graph())
        module.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        result = module.graph.graph_copy(self.module.graph, mapping)
        module.graph.output(result).meta = dict(self._output.meta)
        clone = Graph(module, self.inputs, self.outputs, copy.deepcopy(self.info), dict(self.quantized), self.store, self.encoder)
        clone._adopt_tensors(self)
        module.recompile()
        return clone

    def _adopt_tensors(self, other: Graph) -> None:
        # GraphModule's constructor shares whole submodules; a later add_tensor() on the copy would then reach the original.
        for name in list(self.module._modules):
            del self.module._modules[name]
        for name in list(self.module._parameters):
            del self.module._parameters[name]
        for name in list(self.module._buffers):
            del self.module._buffers[name]
        for name, value in other.constants().items():
            self.share(name, value)

    def share(self, name: str, value: Tensor) -> None:
        """Register ``value`` itself, parameter or buffer, under the dotted ``name``."""
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self.module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(value, torch.nn.Parameter):
            owner._parameters[leaf] = value
        else:
            owner._buffers[leaf] = value

    def clean(self) -> None:
        """Remove what nothing uses, drop unread tensors, lint and recompile."""
        graph = self.module.graph
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and not _has_side_effect(node):
                graph.erase_node(node)
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        _drop_unread(self.module, read)
        self.quantized = {name: value for name, value in self.quantized.items() if name in read}
        graph.lint()
        self.module.recompile()

    # -- shapes --------------------------------------------------------------------------------------------------
    def shape(self, node: fx.Node) -> tuple[int | str, ...] | None:
        """The node's shape with dynamic dimensions by name, or None for what is not a tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        names = self.dimension_names()
        return tuple(_dimension(size, names) for size in value.shape)

    def dimension_names(self) -> dict[str, str]:
        """Symbol of the shape environment -> dimension name, as ``{"s72": "batch"}``."""
        names: dict[Any, str] = {}
        for spec, node in zip(self.inputs, self.placeholders, strict=True):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for size, dim in zip(value.shape, spec.shape, strict=True):
                    if isinstance(dim, str):
                        names[size.node.expr if isinstance(size, torch.SymInt) else size] = dim
        return {str(symbol): name for symbol, name in names.items()}  # a model with a cache has dozens of inputs and three symbols

    def infer_shapes(self, hints: dict[str, int] | None = None) -> None:
        """Recompute every node's ``meta["val"]`` by running the graph on fake tensors with symbolic dimensions.

        Args:
            hints: example size per dimension name; they must not be 0 or 1.
        """
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        mode.cache_enabled = False  # the interpreter has its own, over whole operations
        symbols: dict[int | str, Any] = {}
        for position, dim in enumerate(dict.fromkeys(d for spec in self.inputs for d in spec.shape if isinstance(d, str))):
            hint = (hints or {}).get(dim, 3 + 2 * position)
            source = ConstantSource(dim)
            symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            symbols[dim] = env.create_symintnode(symbol, hint=hint, source=source)
        with enable_python_dispatcher(), mode, torch.no_grad():  # symbolic sizes need the Python kernels of composite ops
            values = [torch.empty([symbols.get(d, d) for d in spec.shape], dtype=spec.dtype) for spec in self.inputs]
            _ShapeInterpreter(self.module, mode).run(*values)

    # -- text ----------------------------------------------------------------------------------------------------
    def text(self, *, paths: bool = True) -> str:
        """The graph as a readable program: one node a line, with shapes; grouped by module path."""
        names = self.dimension_names()
        head = f"graph {self.info.get('name', 'model')}({', '.join(map(str, self.inputs))}) -> ({', '.join(self.outputs)}):"
        lines, current = [head], None
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            path = node.meta.get("path", "")
            if paths and node.op == "call_function" and path != current:
                lines.append(f"  # {path or '(top level)'}")
                current = path
            lines.append("  " + _format_node(node, names))
        return "\n".join(lines) + "\n"

    # -- analysis ------------------------------------------------------------------------------------------------
    def to_networkx(self) -> nx.DiGraph:
        """The dataflow as a directed graph; node attributes ``op``, ``path``, ``shape``, ``bytes`` (of constants)."""
        view = nx.DiGraph()
        for node in self.module.graph.nodes:
            constant = self.tensor(node) if node.op == "get_attr" else None
            view.add_node(
                node.name, op=node.op if node.op != "call_function" else op_name(node), path=node.meta.get("path", ""),
                shape=self.shape(node), bytes=constant.numel() * constant.element_size() if constant is not None else 0,
            )  # fmt: skip
            view.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return view


class Builder:
    """Creates call nodes at one place of a graph, with shapes inferred and provenance filled in."""

    def __init__(self, graph: Graph, path: str) -> None:
        self.graph, self.path = graph, path

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        node = self.graph.module.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["path"] = self.path
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = next((v.fake_mode for v in _tensors(values) if hasattr(v, "fake_mode")), None) or FakeTensorMode()
        mode.allow_non_fake_inputs = True
        with mode, torch.no_grad():
            node.meta["val"] = once(mode, target, values[0], values[1], lambda: target(*values[0], **values[1]))
        return node

    def inline(self, function: Callable[..., Any], *args: fx.Node) -> Any:
        """What ``function(*args)`` does, as the operators it calls; gives a node, or a tuple of them where it gives a tuple.

        Raises:
            GraphError: it asks for a dynamic size, or makes a constant of its own.
        """
        values = [n.meta["val"] for n in args]
        mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or FakeTensorMode()
        values = [v if hasattr(v, "fake_mode") else mode.from_tensor(v, static_shapes=True) for v in values]
        with mode, torch.no_grad(), enable_python_dispatcher():
            values = [v.detach() for v in values]  # tracing tells tensors apart; nodes may share one
            traced = make_fx(lambda *given: function(*given))(*values)
        traced.graph.eliminate_dead_code()
        copied: dict[fx.Node, fx.Node] = {}
        given = iter(args)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copied[node] = next(given)
            elif node.op == "get_attr" or node.target is torch.ops.aten.sym_size.int:
                raise GraphError(f"{function} cannot become nodes of a graph: it needs {node.target}")
            elif node.op == "call_function":
                arguments, keywords = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
                copied[node] = self.call(node.target, *arguments, **keywords)
        return fx.map_arg(traced.graph.output_node().args[0], copied.__getitem__)


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors. What is computed from equal arguments is computed once: layers repeat each other, and a fake tensor
    with symbolic sizes takes milliseconds to make. Nodes then share one tensor: their values tell nothing about which is which."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.extra_traceback = False
        self.shares = not any(torch.Tag.inplace_view in getattr(n.target, "tags", ()) for n in module.graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, Tensor) and not hasattr(result, "fake_mode"):
            constant = result
            result = once(self.mode, "constant", (result,), {}, lambda: self._fake(constant))
        n.meta["val"] = result
        n.meta.pop("tensor_meta", None)  # the trace's, with its own symbols for sizes
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compute = partial(super().call_function, target, args, kwargs)
        return once(self.mode, target, args, kwargs, compute) if self.shares else compute()

    def _fake(self, value: Tensor) -> Tensor:
        if not value.is_meta:
            return self.mode.from_tensor(value, static_shapes=True)
        with self.mode:  # a model without weights: as if they were there
            return torch.empty(value.shape, dtype=value.dtype)


def once(mode: FakeTensorMode, what: Hashable, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
    """``compute()``, or what it gave before for ``what`` with fake arguments of the same dtypes, symbolic sizes and values.

    Args:
        mode: of the fake tensors; what it made is kept as long as it is.
        what: the operation.
        args, kwargs: what it is given; tensors are told apart by what an operation can see of a fake one.
        compute: gives fake tensors, a graph over them, or plain values.
    """
    computed: dict[Hashable, Any] = vars(mode).setdefault("dyncomp_computed", {})  # in the mode: these tensors hold it themselves
    key = (what, _description(args), _description(kwargs))
    if key not in computed:
        result = compute()
        if not _repeats(what, result):
            return result
        computed[key] = result
    return computed[key]


def _description(value: Any) -> Hashable:
    """What a fake tensor or another argument is to an operation: equal for those that it treats alike."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return (Tensor, value.dtype, value.device, tuple(map(_description, sizes)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    if isinstance(value, (list, tuple)):
        return tuple(map(_description, value))
    if isinstance(value, dict):
        return tuple((name, _description(item)) for name, item in value.items())
    return (type(value), value)


def _repeats(target: Any, result: Any) -> bool:
    """Whether an operation gives the same again: sizes that depend on data are new ones each time."""
    if isinstance(target, torch._ops.OpOverload) and (target._schema.is_mutable or torch.Tag.data_dependent_output in target.tags):
        return False
    values = [n.meta.get("val") for n in result.graph.nodes] if isinstance(result, fx.GraphModule) else result
    return not any(free_unbacked_symbols(value) for value in _tensors(values))


def op_name(node: fx.Node) -> str:
    """Short name of what a call node calls: ``linear``, ``dyncomp.routed_ffn``, ``getitem``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = "" if target._overloadname == "default" else "." + target._overloadname
        return (name if namespace == "aten" else f"{namespace}.{name}") + overload
    return getattr(target, "__name__", str(target))


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _tensors(value: Any) -> Iterable[Any]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _dimension(size: Any, names: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(0), m.group(0)), str(size))


def _format_value(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        return f"{_DTYPE_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(str(_dimension(s, names)) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_format_value(v, names) for v in value) + ")"
    if isinstance(value, (torch.SymInt, int)):
        return "int"
    return type(value).__name__


def _format_argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_format_argument(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    if value == 9223372036854775807:
        return "end"
    return str(value)


def _format_node(node: fx.Node, names: dict[str, str]) -> str:
    if node.op == "output":
        return f"return {', '.join(_format_argument(a) for a in node.args[0])}"  # type: ignore[union-attr]
    arguments = [_format_argument(a) for a in node.args]
    arguments += [f"{k}={_format_argument(v)}" for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")]
    annotation = f": {_format_value(node.meta['val'], names)}" if "val" in node.meta else ""
    return f"{node.name}{annotation} = {op_name(node)}({', '.join(arguments)})"


def _has_side_effect(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem or node.op == "get_attr":
        return False
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _drop_unread(module: torch.nn.Module, read: set[str], prefix: str = "") -> None:
    for table in (module._parameters, module._buffers):
        for name in [n for n in table if prefix + n not in read]:
            del table[name]
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        _drop_unread(child, read, f"{prefix}{name}.")
        if not (child._parameters or child._buffers or child._modules):
            del module._modules[name]
