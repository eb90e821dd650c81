"""From a model to a :class:`~dyncomp.graph.Graph`: ``torch.export``, then a small canonical form."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dyncomp import functional, serialize, stacks
from dyncomp.cache import cache_folder
from dyncomp.errors import DyncompError, GraphError, TraceError
from dyncomp.functional import functionalize
from dyncomp.graph import Graph, TensorSpec
from dyncomp.models.loaded import LoadedModel
from dyncomp.regions import mixture
from dyncomp.regions.mixture import lift_mixtures
from dyncomp.replaced import replaced
from dyncomp.serialize import read_structure, write_structure
from dyncomp.stacks import computes, find_stacks, repeat, shortened
from dyncomp.whole import replacing

aten = torch.ops.aten
_END = 9223372036854775807


def trace(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_dims: Mapping[str, Mapping[int, str]],
    *,
    output_name: str = "output",
    info: Mapping[str, Any] | None = None,
) -> Graph:
    """Trace ``module`` into a flat ATen graph with dynamic dimensions.

    Args:
        module: takes ``example_inputs`` by keyword, returns one tensor (or a tuple of tensors). May be on the meta
            device: then no weight is ever allocated.
        example_inputs: tensors by argument name; dynamic dimensions must have sizes of at least 2.
        dynamic_dims: argument name -> {dimension -> name}, e.g. ``{"input_ids": {0: "batch", 1: "sequence"}}``.
        output_name: name of the (first) output.
        info: facts to keep with the graph.

    Raises:
        TraceError: the model cannot be exported, or a dimension declared dynamic is fixed by the model's code.
    """
    export = partial(_export, module, example_inputs, dynamic_dims, output_name, info)
    if repeated := find_stacks(module):
        with contextlib.suppress(Exception):  # a model that does not run without all of its layers
            with shortened(repeated):
                graph = export()
            if all(repeat(graph, stack) for stack in repeated):
                graph.clean()
                if computes(graph, module, example_inputs):
                    return graph
    return export()


def _export(
    module: nn.Module, example_inputs: Mapping[str, Tensor], dynamic_dims: Mapping[str, Mapping[int, str]], output_name: str,
    info: Mapping[str, Any] | None,
) -> Graph:  # fmt: skip
    dynamic_shapes = {name: dict.fromkeys(dynamic_dims.get(name, {}), torch.export.Dim.AUTO) or None for name in example_inputs}
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quickly(), undisturbed():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (), dict(example_inputs), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise TraceError(
            f"{type(module).__name__} cannot be traced by torch.export: {_first_line(error)}",
            hint="check that the forward pass has no data-dependent Python control flow",
        ) from error
    return from_exported(program, dynamic_dims, output_name=output_name, info=info)


def _quickly() -> contextlib.AbstractContextManager[None]:
    """Nodes are known by their modules: where in its code each was made takes a sixth of the tracing to find out. And a fake tensor of
    symbolic sizes takes as long to keep for an operation that is met again as to make: a third."""
    settings = (("torch.fx.config", "do_not_emit_stack_traces", True), ("torch._dynamo.config", "fake_tensor_cache_enabled", False))
    known = ((importlib.import_module(owner), name, value) for owner, name, value in settings)
    return replaced(*(setting for setting in known if hasattr(*setting[:2])))  # other versions of torch have other ones


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For what makes graphs by the thousand nodes: nothing is collected, since all of it is in use, and graph modules write their Python
    code when they are first run, which most of those that torch makes never are. A quarter of the time of a trace."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _lazy_modules():
            yield
    finally:
        if collecting:
            gc.enable()


def _lazy_modules() -> contextlib.AbstractContextManager[None]:
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:  # an older torch
        return contextlib.nullcontext()
    return _use_lazy_graph_module(True)


def trace_model(loaded: LoadedModel) -> Graph:
    """The graph of a loaded model.

    The structure of a model that its configuration describes is kept in the cache folder: tracing it a second time only reads it.
    """
    file = _cached_structure(loaded)
    own = dict(loaded.module.named_parameters(remove_duplicate=False)) | dict(loaded.module.named_buffers(remove_duplicate=False))
    info: dict[str, Any] = {"name": loaded.name, "task": loaded.task, "context_length": loaded.context_length}
    if loaded.decoding is not None:
        info["begin"] = list(loaded.decoding.begin)
    if file is not None and file.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, DyncompError):  # a damaged file counts as absent
            document = json.loads(file.read_text())
            kept = read_structure(document | {"info": document["info"] | info}, {name: own[name] for name in document["tensors"]}, file)
            if computes(kept, loaded.module, loaded.example_inputs):
                return kept
    graph = trace(loaded.module, loaded.example_inputs, loaded.dynamic_dims, output_name=loaded.output_name, info=info)
    tensors = list(graph.constants())
    if file is not None and all(name in own for name in tensors):
        with contextlib.suppress(OSError, GraphError), replacing(file) as part:
            part.write_text(json.dumps(write_structure(graph) | {"tensors": tensors}))
    return graph


def _cached_structure(loaded: LoadedModel) -> Path | None:
    """Where the traced structure of a model is kept; None for models whose code no configuration describes."""
    described = next((m.config for m in loaded.module.modules() if hasattr(m, "config")), None)
    if loaded.kind not in ("huggingface", "gguf", "packaged") or described is None:
        return None
    import transformers

    facts = [
        loaded.config, loaded.dynamic_dims, loaded.output_name, str(loaded.module), getattr(described, "_attn_implementation", ""),
        [(name, list(t.shape), str(t.dtype)) for name, t in [*loaded.example_inputs.items(), *loaded.module.state_dict().items()]],
        torch.__version__, transformers.__version__,
        *(Path(str(m.__file__)).read_text() for m in (sys.modules[__name__], functional, mixture, serialize, stacks)),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    return cache_folder() / "traces" / f"{digest.hexdigest()[:32]}.json"


def from_exported(
    program: torch.export.ExportedProgram,
    dynamic_dims: Mapping[str, Mapping[int, str]],
    *,
    output_name: str = "output",
    info: Mapping[str, Any] | None = None,
) -> Graph:
    """Make a :class:`Graph` of an exported program; see :func:`trace`."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())  # flat signature: tensors in, tuple of tensors out
    specs = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)  # the argument's name; fx renames the node where that is a builtin (`input`)
        value, dims = node.meta["val"], dict(dynamic_dims.get(name, {}))
        if not isinstance(value, Tensor):
            raise TraceError(f"the input {name!r} is a {type(value).__name__}; only tensors can be graph inputs")
        for dim, label in dims.items():
            if (fixed := _fixed_size(value.shape[dim])) is not None:
                raise TraceError(
                    f"dimension {dim} ({label}) of the input {name!r} is declared dynamic, but the model fixes it to {fixed}",
                    hint="trace it as a static dimension, or with another attention implementation",
                )
        shape = tuple(dims.get(i, f"d{i}" if _fixed_size(size) is None else int(size)) for i, size in enumerate(value.shape))
        specs.append(TensorSpec(name, value.dtype, shape))
    outputs = next(n for n in module.graph.nodes if n.op == "output").args[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    names = (output_name, *(f"{output_name}_{i}" for i in range(1, len(outputs))))
    for node in module.graph.nodes:
        node.meta["path"] = _module_path(node)
    graph = Graph(fx.GraphModule(module, module.graph), tuple(specs), names, dict(info or {}))
    canonicalize(graph)
    lift_mixtures(graph)
    return graph


def canonicalize(graph: Graph) -> None:
    """Remove what computes nothing: metadata assertions, casts to the same dtype, whole slices, dropout, ``* 1`` and ``+ 0``, and
    tensors of no elements that something is appended to, as an empty KV cache is.

    ``view`` becomes ``reshape``, which does not depend on strides, and ``add_`` becomes ``add`` where nothing else can see the
    difference: a rewrite need not know how its inputs lie in memory.
    """
    for node in list(graph.module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.cat.default:
            parts = cast(list[fx.Node], node.args[0])
            node.update_arg(0, [part for part in parts if part.meta["val"].shape != (0,)] or parts)
        if node.target is aten._assert_tensor_metadata.default or node.target in _ASSERTIONS:
            graph.module.graph.erase_node(node)
        elif (source := _identity_of(node)) is not None:
            node.replace_all_uses_with(source)
            graph.module.graph.erase_node(node)
        elif node.target in _VIEWS:
            node.target = aten.reshape.default
        elif node.kwargs.get("device") == torch.device("meta"):  # the graph of a model without weights is the one with them
            node.kwargs = node.kwargs | {"device": torch.device("cpu")}
    functionalize(graph)
    graph.clean()


_ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_ALWAYS_IDENTITY = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default, aten.to.other}
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.dropout_.default}


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The node that ``node`` merely repeats, or None."""
    target, args = node.target, node.args
    if target is aten.cat.default and len(parts := cast(list[fx.Node], args[0])) == 1:
        return parts[0]
    source = args[0] if args and isinstance(args[0], fx.Node) else None
    if source is None:
        return None
    if target in _ALWAYS_IDENTITY or target in _DROPOUT:  # graphs are for inference: dropout is off
        return source
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if target in _CASTS and before.dtype == after.dtype and before.device == after.device:
        return source
    if target is aten.slice.Tensor and len(args) < 5:
        start, end = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
        if start in (None, 0) and end in (None, _END):
            return source
    if len(args) >= 2 and after.dtype == before.dtype and not node.kwargs:
        neutral = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}.get(target)  # type: ignore[call-overload]
        if neutral is not None and isinstance(args[1], (int, float)) and args[1] == neutral:
            return source
    return None


def _fixed_size(size: int | torch.SymInt) -> int | None:
    """The size of a dimension that cannot vary; a symbol that the model's code pins to one value is fixed too."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_empty_nn_module_stack") else path


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
