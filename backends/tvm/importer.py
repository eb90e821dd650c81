"""From a selected graph to a Relax module: PyTorch's export, TVM's importer, and a converter for each of our operators."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import tvm
from dyncomp.backends.program import default_decompositions, expand, is_composite
from dyncomp.backends.tvm import ops
from dyncomp.backends.tvm.kernels.attention import Attention
from dyncomp.backends.tvm.kernels.attention import cached_attention as attention_kernel
from dyncomp.backends.tvm.kernels.functions import FUNCTIONS
from dyncomp.backends.tvm.kernels.gated_linear import gated_linear as gated_kernel
from dyncomp.backends.tvm.kernels.norm import norm as norm_kernel
from dyncomp.backends.tvm.kernels.sdpa import attention as sdpa_kernel
from dyncomp.backends.tvm.native import PREFIX
from dyncomp.backends.tvm.shapes import FFNShape, LinearShape, Tiles
from torch import fx
from torch._ops import OpOverload
from tvm import relax, te, tirx
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from dyncomp.errors import BackendError
from dyncomp.graph import Graph

Converter = Callable[[fx.Node, Any], Any]
_MUTATIONS = ("BUFFER_MUTATION", "USER_INPUT_MUTATION", "PARAMETER_MUTATION")


def import_graph(graph: Graph, program: torch.export.ExportedProgram, converters: Converters) -> Any:
    """The ``IRModule`` of an exported program; parameters become inputs after the graph's own.

    Args:
        converters: made for this call.

    Raises:
        BackendError: an operator has no converter, or the program changes a buffer (TVM would drop that silently); names it.
    """
    for spec in program.graph_signature.output_specs:
        if spec.kind.name in _MUTATIONS:
            raise BackendError(f"the graph changes {spec.target!r} in place, which TVM drops silently", hint="use --backend ort")
    table = converters.table()
    try:
        _expand_unknown(program, table)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return from_exported_program(program, keep_params_as_input=True, run_ep_decomposition=False, custom_convert_map=table)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"the graph cannot be written for TVM: {_explain(error)}", hint="use --backend ort") from error


def _expand_unknown(program: torch.export.ExportedProgram, converters: dict[str, Converter]) -> None:
    """Replace operators without a converter by those they are made of, where PyTorch knows them."""
    decompositions = default_decompositions()
    for node in program.graph.nodes:
        if (
            isinstance(node.target, OpOverload)
            and node.target.__name__ not in converters
            and (node.target in decompositions or is_composite(node.target))
        ):
            expand(program.graph_module, node, decompositions)


class Converters:
    """One method for each operator; all kernels of a module are made once and named after what they are."""

    functions = FUNCTIONS

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.tile = tiles, tiles.default
        self.kernels: dict[Any, Any] = {}
        self.importer: Any = None
        self.own: dict[str, Any] = {}

    def table(self) -> dict[str, Converter]:
        converters: dict[str, Converter] = {name: self.plain(name) for name in ExportedProgramImporter().create_convert_map()}
        converters |= {
            "tvm_linear.default": self.linear,
            "tvm_gated_linear.default": self.gated_linear,
            "tvm_norm.default": self.norm,
            "tvm_routed_ffn.default": self.routed_ffn,
            "tvm_native.default": self.native,
            "tvm_cached_attention.default": self.cached_attention,
            "tvm_native_attention.default": self.native_attention,
            "scaled_dot_product_attention.default": self.attention,
            "to.device": self.to_device,
            "index.Tensor": self.index,
            "slice.Tensor": self.slice,
            "repeat.default": self.repeat,
            "rsub.Scalar": self.rsub,
            "threshold_gates.default": self.threshold_gates,
            "topk_gates.default": self.topk_gates,
            "gelu.default": self.gelu,
        }
        for name in ("silu", "sigmoid", "tanh"):
            converters[f"{name}.default"] = self.pointwise(name)
        return {name: _pinned(convert) for name, convert in converters.items()}

    def plain(self, name: str) -> Converter:
        """TVM's own converter."""

        def convert(node: fx.Node, importer: Any) -> Any:
            if self.importer is not importer:
                self.importer, self.own = importer, importer.create_convert_map()
            return self.own[name](node)

        return convert

    def kernel(self, importer: Any, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """The module's function for a kernel, made when it is first asked for."""
        if (name, key) not in self.kernels:
            self.kernels[name, key] = importer.block_builder.add_func(make(), name)
        return self.kernels[name, key]

    # ---- kernels ---------------------------------------------------------------------------------------------------
    def linear(self, node: fx.Node, importer: Any) -> Any:
        x, weight, bias = arguments(node, importer)[:3]
        rows, depth = cast(int, node.args[3]), int(x.ty.shape[-1])
        shape = LinearShape(rows, depth)
        kernel = self.kernel(importer, f"linear_{rows}_{depth}", None, lambda: shape.build(self.tiles.of(shape)))
        lead = list(x.ty.shape)[:-1]
        return self.on_rows(importer, kernel, x, [weight, bias], lead, rows)

    def gated_linear(self, node: fx.Node, importer: Any) -> Any:
        x, gates, weight, bias = arguments(node, importer)[:4]
        rows, depth = cast(int, node.args[4]), int(x.ty.shape[-1])
        kernel = self.kernel(importer, f"gated_linear_{rows}_{depth}", None, lambda: gated_kernel(rows, depth, self.tile))
        lead = list(x.ty.shape)[:-1]
        if len(lead) > 1:
            gates = importer.block_builder.emit(relax.op.reshape(gates, relax.ShapeExpr([_size(lead), 1])))
        return self.on_rows(importer, kernel, x, [gates, weight, bias], lead, rows)

    def norm(self, node: fx.Node, importer: Any) -> Any:
        x, scale, shift = arguments(node, importer)[:3]
        epsilon, centered = cast(float, node.args[3]), cast(bool, node.args[4])
        features = int(x.ty.shape[-1])
        name = f"{'layer' if centered else 'rms'}_norm_{features}"
        kernel = self.kernel(importer, name, epsilon, lambda: norm_kernel(features, epsilon, centered=centered, lanes=self.tile.lanes))
        return self.on_rows(importer, kernel, x, [scale, shift], list(x.ty.shape)[:-1], features)

    def routed_ffn(self, node: fx.Node, importer: Any) -> Any:
        builder, given = importer.block_builder, arguments(node, importer)
        x, gates, up, bias, down, neurons, rows, activation, gated = given
        experts, depth = int(up.ty.shape[0]), int(x.ty.shape[-1])
        shape = FFNShape(experts, neurons, depth, rows, activation, gated)
        name = f"routed_ffn_{experts}_{neurons}_{depth}"
        kernel = self.kernel(importer, name, shape, lambda: self.routed_ffn_kernel(shape))
        lead = list(x.ty.shape)[:-1]
        if len(lead) > 1:
            gates = builder.emit(relax.op.reshape(gates, relax.ShapeExpr([_size(lead), experts])))
        return self.on_rows(importer, kernel, x, [gates, up, bias, down], lead, rows)

    def routed_ffn_kernel(self, shape: FFNShape) -> Any:
        return shape.build(self.tiles.of(shape))

    def native(self, node: fx.Node, importer: Any) -> Any:
        """A packed function of the native library, on weights as it stores them."""
        operator, inputs, attributes, leading, width = node.args
        given: list[Any] = [value_of(i, importer) if isinstance(i, fx.Node) else None for i in cast(list[Any], inputs)]
        return self.packed(importer, str(operator), str(attributes), given, [*list(given[0].ty.shape)[: cast(int, leading)], width])

    def native_attention(self, node: fx.Node, importer: Any) -> Any:
        """The packed function of attention, which updates the caches it is given."""
        names = ("query", "key", "value", "key_cache", "value_cache", "past", "cos", "sin")
        every = (*names, "heads", "scale", "window", "softcap", "interleaved", "present", "bias")
        given = dict(zip(every, arguments(node, importer), strict=False))  # the last two may be left out
        gates = node.kwargs.get("gates")
        key_cache, value_cache = given["key_cache"], given["value_cache"]
        attributes = {name: given[name] for name in ("heads", "interleaved", "window", "scale", "softcap")}
        text = ops.attributes_text(attributes | {"kv_heads": int(key_cache.ty.shape[1])})
        inputs = [*(given.get(name) for name in (*names, "present", "bias")), None if gates is None else value_of(gates, importer)]
        operator = "quantized_cached_attention" if str(key_cache.ty.dtype) == "uint8" else "cached_attention"
        shape = [*list(given["query"].ty.shape)[:2], int(node.meta["val"][0].shape[2])]
        return [self.packed(importer, operator, text, inputs, shape), key_cache, value_cache]

    def packed(self, importer: Any, operator: str, attributes: str, inputs: list[Any], shape: list[Any]) -> Any:
        """A call of a native operator's packed function; None among the inputs for what is absent."""
        operands = [relax.op.null_value() if value is None else value for value in inputs]
        out = relax.TensorType(shape, "float32")
        return importer.block_builder.emit(relax.op.call_dps_packed(f"{PREFIX}{operator}", [tvm.ir.StringImm(attributes), *operands], out))

    def on_rows(self, importer: Any, kernel: Any, x: Any, rest: list[Any], lead: list[Any], width: int) -> Any:
        """kernel(x [M, K], *rest) -> [M, width] on x [*lead, K]."""
        builder, tokens = importer.block_builder, _size(lead)
        flat = x if len(lead) == 1 else builder.emit(relax.op.reshape(x, relax.ShapeExpr([tokens, x.ty.shape[-1]])))
        y = builder.emit(relax.call_tir(kernel, [flat, *rest], relax.TensorType([tokens, width], "float32")))
        return y if len(lead) == 1 else builder.emit(relax.op.reshape(y, relax.ShapeExpr([*lead, width])))

    def cached_attention(self, node: fx.Node, importer: Any) -> Any:
        builder, given = importer.block_builder, arguments(node, importer)
        query, key, value, key_cache, value_cache, past, cos, sin, heads, scale, window, softcap, interleaved, *optional = given
        bias = optional[1] if optional else None
        batch, tokens = list(query.ty.shape)[:2]
        kv_heads, head_dim = int(key_cache.ty.shape[1]), int(key_cache.ty.shape[3])
        half = 0 if cos is None else int(cos.ty.shape[1])
        if cos is None:
            cos = sin = builder.emit(relax.op.zeros([1, 1], "float32"))
        what = Attention(heads, kv_heads, head_dim, scale, window, softcap, half, interleaved, packed=key is None, biased=bias is not None)
        if bias is None:
            bias = builder.emit(relax.op.zeros([heads, 1], "float32"))
        kernel = self.kernel(importer, f"cached_attention_{heads}_{kv_heads}_{head_dim}", what, lambda: self.attention_kernel(what))
        if key is None:
            key = value = query
        out = relax.TensorType([batch, tokens, heads * head_dim], "float32")
        operands = [query, key, value, past, cos, sin, bias, key_cache, value_cache]
        made = builder.emit(relax.op.call_tir_inplace(kernel, operands, [7, 8, -1], [key_cache.ty, value_cache.ty, out]))
        key_cache, value_cache, result = (builder.emit(relax.TupleGetItem(made, i)) for i in range(3))
        return [result, key_cache, value_cache]

    def attention_kernel(self, what: Attention) -> Any:
        return attention_kernel(what, self.tile)

    def attention(self, node: fx.Node, importer: Any) -> Any:
        builder = importer.block_builder
        q, k, v, found, dropout, causal = [*arguments(node, importer), *[None] * 3][:6]
        if isinstance(given := node.kwargs.get("attn_mask"), fx.Node):
            found = value_of(given, importer)
        features = int(q.ty.shape[3])
        if (
            causal
            or node.kwargs.get("is_causal")
            or dropout
            or node.kwargs.get("dropout_p")
            or int(v.ty.shape[3]) != features
            or len(q.ty.shape) != 4
        ):
            raise BackendError(f"{node.name}: this form of scaled_dot_product_attention has no TVM kernel", hint="use --backend ort")
        kind = "none" if found is None else str(found.ty.dtype)
        if found is None:
            found = builder.emit(relax.op.zeros([1, 1, 1, 1], "float32"))
        while len(found.ty.shape) < 4:
            found = builder.emit(relax.op.expand_dims(found, 0))
        scale = cast(float | None, node.kwargs.get("scale")) or features**-0.5
        kernel = self.kernel(importer, f"attention_{features}", (scale, kind), lambda: sdpa_kernel(features, scale, kind, self.tile))
        return builder.emit(relax.call_tir(kernel, [q, k, v, found], q.ty))

    def to_device(self, node: fx.Node, importer: Any) -> Any:
        """``x.to(device, dtype)``: there is one device."""
        dtype = cast(torch.dtype, node.args[2] if len(node.args) > 2 else node.kwargs["dtype"])
        return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], str(dtype).removeprefix("torch.")))

    def slice(self, node: fx.Node, importer: Any) -> Any:
        """A slice whose end is a symbol, from a constant start (TVM's own leaves its shape unknown); others as TVM has them."""
        _, axis, start, _, step = [*arguments(node, importer), *[None] * 4][:5]
        plain = isinstance(start or 0, int) and (start or 0) >= 0 and step in (None, 1)
        if not plain or all(isinstance(size, int) for size in node.meta["val"].shape):
            return importer._slice(node)

        def cut(t: Any) -> Any:
            index, shift = (axis or 0) % len(t.shape), start or 0
            return te.compute(shape, lambda *at: t(*at[:index], at[index] + shift, *at[index + 1 :]), name="slice")

        shape = _traced_shape(node, importer)
        return importer.block_builder.emit_te(cut, value_of(node.args[0], importer), primfunc_name_hint="slice")

    def repeat(self, node: fx.Node, importer: Any) -> Any:
        """``x.repeat(…)``, also as often as an input's size says (TVM's own takes constants)."""
        x = value_of(node.args[0], importer)
        times = [importer.env[t] if isinstance(t, fx.Node) else t for t in cast(list[Any], node.args[1])]
        sizes = [1] * (len(times) - len(x.ty.shape)) + list(x.ty.shape)
        added = len(times) - len(x.ty.shape)

        try:
            out = _traced_shape(node, importer)
        except BackendError:  # a size is a product
            out = [size * time for size, time in zip(sizes, times, strict=True)]

        def tiled(t: Any) -> Any:
            return te.compute(
                out, lambda *at: t(*(0 if _is_one(d) else i % d for i, d in zip(at[added:], t.shape, strict=True))), name="repeat"
            )

        return importer.block_builder.emit_te(tiled, x, primfunc_name_hint="repeat")

    def index(self, node: fx.Node, importer: Any) -> Any:
        """``x[i, j, …]`` with an index tensor for each dimension (TVM's own converter loses the shape); others as TVM has them."""
        x, indices = value_of(node.args[0], importer), [value_of(i, importer) for i in cast(list[Any], node.args[1]) if i is not None]
        if len(indices) != len(x.ty.shape) or any(str(i.ty.dtype) == "bool" for i in indices):
            return importer._index_tensor(node)
        rank = max(len(i.ty.shape) for i in indices)
        shapes = [[1] * (rank - len(i.ty.shape)) + list(i.ty.shape) for i in indices]
        out = [next((d for d in dims if not _is_one(d)), dims[0]) for dims in zip(*shapes, strict=True)]

        def pick(t: Any, *positions: Any) -> Any:
            def at(*where: Any) -> Any:
                found = []
                for position, shape in zip(positions, shapes, strict=True):
                    mine = [0 if _is_one(d) else w for w, d in zip(where, shape, strict=True)]
                    found.append(position(*mine[rank - len(position.shape) :]))
                return t(*found)

            return te.compute(out, at, name="index")

        return importer.block_builder.emit_te(pick, x, *indices, primfunc_name_hint="index")

    # ---- pointwise -------------------------------------------------------------------------------------------------
    def pointwise(self, name: str) -> Converter:
        function = self.functions[name]

        def convert(node: fx.Node, importer: Any) -> Any:
            return self.map(importer, value_of(node.args[0], importer), function, name)

        return convert

    def gelu(self, node: fx.Node, importer: Any) -> Any:
        name = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
        return self.map(importer, value_of(node.args[0], importer), self.functions[name], name)

    def map(self, importer: Any, x: Any, function: Any, name: str) -> Any:
        return importer.block_builder.emit_te(
            lambda t: te.compute(t.shape, lambda *at: function(t(*at)), name=name), x, primfunc_name_hint=name
        )

    def rsub(self, node: fx.Node, importer: Any) -> Any:
        """``other - alpha * x`` in the result's dtype (TVM's own takes an integer for an int32)."""
        x, other, alpha = [*arguments(node, importer), 1][:3]
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        x = x if str(x.ty.dtype) == dtype else importer.block_builder.emit(relax.op.astype(x, dtype))
        x = x if alpha == 1 else importer.block_builder.emit(relax.op.multiply(x, relax.const(alpha, dtype)))
        return importer.block_builder.emit(relax.op.subtract(relax.const(other, dtype), x))

    def threshold_gates(self, node: fx.Node, importer: Any) -> Any:
        scores = importer.env[node.args[0]]
        positive = importer.block_builder.emit(relax.op.greater(scores, relax.const(0.0, "float32")))
        return importer.block_builder.emit(relax.op.astype(positive, "float32"))

    def topk_gates(self, node: fx.Node, importer: Any) -> Any:
        """1 for a score that fewer than k scores precede: larger ones, and equal ones before it."""
        scores, k = value_of(node.args[0], importer), cast(int, node.args[1])
        experts = int(scores.ty.shape[-1])

        def gates(t: Any) -> Any:
            other = te.reduce_axis((0, experts), "other")

            def precedes(*at: Any) -> Any:
                mine, theirs = t(*at), t(*at[:-1], other.var)
                before = tirx.any(theirs > mine, tirx.all(theirs == mine, other.var < at[-1]))
                return te.sum(tirx.Cast("int32", before), axis=other)

            rank = te.compute(t.shape, precedes, name="rank")
            return te.compute(t.shape, lambda *at: tirx.Cast("float32", rank(*at) < k), name="topk_gates")

        return importer.block_builder.emit_te(gates, scores, primfunc_name_hint="topk_gates")


def _pinned(convert: Converter) -> Converter:
    """With the shape and dtype that the export knows: what is lost once is lost to the end."""

    def pinned(node: fx.Node, importer: Any) -> Any:
        importer.env[node] = convert(node, importer)
        return value_of(node, importer)

    return pinned


def arguments(node: fx.Node, importer: Any) -> list[Any]:
    return [value_of(a, importer) if isinstance(a, fx.Node) else a for a in node.args]


def value_of(node: Any, importer: Any) -> Any:
    """What a node became, with the shape and dtype that the export knows where TVM lost them."""
    value, traced = importer.env[node], node.meta.get("val")
    if not isinstance(traced, torch.Tensor):
        return value
    if str(value.ty.dtype) != (dtype := str(traced.dtype).removeprefix("torch.")):
        value = importer.env[node] = importer.block_builder.emit(relax.op.astype(value, dtype))
    if getattr(value.ty, "shape", ()) is not None:
        return value
    shape = _traced_shape(node, importer)
    importer.env[node] = importer.block_builder.match_cast(value, relax.TensorType(shape, value.ty.dtype))
    return importer.env[node]


def _traced_shape(node: fx.Node, importer: Any) -> list[Any]:
    """The shape that the export found, in the module's symbols.

    Raises:
        BackendError: a size is neither constant nor one of the inputs' sizes.
    """
    symbols = {}
    for other, made in importer.env.items():
        if other.op == "placeholder" and isinstance(known := other.meta.get("val"), torch.Tensor):
            symbols.update({str(size): dim for size, dim in zip(known.shape, made.ty.shape, strict=True)})
    shape = node.meta["val"].shape
    try:
        return [size if isinstance(size, int) else symbols[str(size)] for size in shape]
    except KeyError as error:
        raise BackendError(f"{node.name}: TVM cannot compute its shape {list(shape)}", hint="use --backend ort") from error


def _is_one(size: Any) -> bool:
    return isinstance(size, int | tirx.IntImm) and int(size) == 1


def _size(shape: list[Any]) -> Any:
    size = shape[0]
    for dim in shape[1:]:
        size = size * dim
    return size


def _explain(error: BaseException) -> str:
    text = str(error).strip()
    if found := re.search(r"Unsupported function types \[(.*?)\]", text):
        return f"no converter for {found[1]}"
    return (text.splitlines() or [type(error).__name__])[0][:300]
