"""A graph as the ExportedProgram that torch.onnx and TVM read, without tracing it again."""

from __future__ import annotations

import functools
import operator
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dyncomp.errors import BackendError
from dyncomp.functional import writes
from dyncomp.graph import Graph, once, op_name


class FlatProgram(ExportedProgram):
    """Nearly every operator of the graph has an ONNX form as it is: only those that have none are decomposed, each by itself. The
    exporter would trace the whole program again, a third of its time."""

    def run_decompositions(self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> ExportedProgram:
        kept = default_decompositions()
        for node in self.graph.nodes:
            if isinstance(node.target, OpOverload) and (
                node.target in decomp_table or (is_composite(node.target) and node.target not in kept)
            ):
                expand(self.graph_module, node, decomp_table)
        return self


@functools.cache
def default_decompositions() -> Any:
    """PyTorch's table, which looks at every registered operator each time it is made."""
    return torch.export.default_decompositions()


def is_composite(operator: OpOverload) -> bool:
    return operator.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def exported_program(graph: Graph) -> ExportedProgram:
    """``graph`` as :func:`torch.export.export` would give it: constants are inputs of their own, calls are of operators.

    Args:
        graph: changed: functions it calls are expanded.
    """
    modes = {getattr(n.meta.get("val"), "fake_mode", None) for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    if None in modes or len(modes) > 1:
        graph.infer_shapes()  # what made the graph worked on real tensors, or on shapes of several runs
    expand_functions(graph)
    if (writing := next((n for n in graph.nodes if writes(n)), None)) is not None:
        where = f" in {writing.meta['path']}" if writing.meta.get("path") else ""
        raise BackendError(f"{op_name(writing)}{where} writes into its input, which is seen elsewhere", hint="use --backend torch")
    flat = fx.Graph()
    constants: dict[str, fx.Node] = {}
    inputs = []
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) not in constants:
            constants[str(node.target)] = placeholder = flat.placeholder(f"constant_{len(constants)}")
            placeholder.meta["val"] = node.meta["val"]
            inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(placeholder.name), str(node.target), persistent=True))
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            copied[node] = constants[str(node.target)]
        elif node.op != "output":
            copied[node] = flat.node_copy(node, copied.__getitem__)
            if node.op == "placeholder":
                inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copied[node].name), None))
    results = tuple(copied[n] for n in graph.output_nodes)
    flat.output(results).meta["val"] = tuple(n.meta["val"] for n in results)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results]
    arguments = pytree.tree_structure(((0,) * len(graph.inputs), {}))
    signature = ModuleCallSignature([], [], arguments, pytree.tree_structure(results))
    return FlatProgram(
        root=torch.nn.Module(), graph=flat, graph_signature=ExportGraphSignature(inputs, outputs), range_constraints={},
        state_dict={str(n.target): graph.tensor(n) for n in graph.nodes if n.op == "get_attr"},
        module_call_graph=[ModuleCallEntry("", signature)],
    )  # fmt: skip


def expand_functions(graph: Graph) -> None:
    """Replace every call of a Python function by the operators it calls."""
    for node in graph.nodes:
        if isinstance(node.target, types.FunctionType):
            expand(graph.module, node)
    graph.module.graph.eliminate_dead_code()


def expand(module: fx.GraphModule, node: fx.Node, decompositions: Any = None) -> None:
    """Replace a call by what it does, as operators."""
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(v, fx.Node) else v for v in leaves], structure)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [n.meta["val"] for n in operands]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))  # for tensors that the call itself makes
    with torch.no_grad(), enable_python_dispatcher(), mode:
        values = [v.detach() if isinstance(v, Tensor) else v for v in values]  # tracing tells tensors apart; nodes may share one
        args, kwargs = pytree.tree_unflatten([v.meta["val"] if isinstance(v, fx.Node) else v for v in leaves], structure)
        compute = partial(make_fx(call, decomposition_table=decompositions), *values)
        traced = once(mode, (expand, node.target, id(decompositions)), args, kwargs, compute)  # layers repeat each other
    copied: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "get_attr":
                raise BackendError(f"{node.target} makes a tensor of its own", hint="give it as a constant of the graph")
            if inner.op == "call_function":
                if inner.target is torch.ops.aten.sym_numel.default:  # ONNX has no form for it
                    copied[inner] = _elements(module.graph, copied[inner.args[0]])
                else:
                    copied[inner] = module.graph.node_copy(inner, copied.__getitem__)
                copied[inner].meta["path"] = node.meta.get("path", "")
    result: Any = traced.graph.output_node().args[0]
    for user in list(node.users) if not isinstance(result, fx.Node) else ():
        user.replace_all_uses_with(copied[result[user.args[1]]])
        module.graph.erase_node(user)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(copied[result])
    module.graph.erase_node(node)


def _elements(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """The number of elements of ``x``, as a product of its sizes."""
    sizes = x.meta["val"].shape
    total: Any = 1
    count = 1
    for axis, size in enumerate(sizes):
        dim: Any = size
        if not isinstance(size, int):
            dim = graph.call_function(torch.ops.aten.sym_size.int, (x, axis))
            dim.meta["val"] = size
        count = count * size
        if isinstance(total, int) and isinstance(dim, int):
            total = total * dim
        else:
            total = graph.call_function(operator.mul, (total, dim))
            total.meta["val"] = count
    return total
