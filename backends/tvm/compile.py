"""From a Relax module to a library: the passes, the schedule of what has no kernel, and the count of what is called."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import tvm
import tvm.relax.backend
from tvm import relax

from dyncomp.errors import BackendError


def compile_module(
    module: Any, target: Any, *, fusions: Sequence[Any] = (), schedules: Sequence[Any] = ()
) -> tuple[Any, dict[str, int], list[str]]:
    """Compile for a ``tvm.target.Target``.

    Args:
        fusions: passes over operators, before they become loops.
        schedules: passes that give what has no kernel of ours a schedule.

    Returns:
        the executable; how many calls of each function there are; the names of ``main``'s parameters in order.

    Raises:
        BackendError: something in the module has no form that TVM could lower.
    """
    module, _ = relax.frontend.detach_params(module)
    order = [str(v.name) for v in module["main"].params]
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        *fusions,
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        *schedules,
    ]
    try:
        with target:
            module = tvm.transform.Sequential(passes)(module)
        kernels = count_calls(module)
        executable = tvm.compile(module, target=target, relax_pipeline=_finish())
    except Exception as error:
        raise BackendError(f"TVM cannot compile the graph: {' '.join(str(error).split())[:300]}", hint="use --backend ort") from error
    return executable, kernels, order


def count_calls(module: Any) -> dict[str, int]:
    """Compiled functions that ``main`` calls, and how often."""
    calls: collections.Counter[str] = collections.Counter()

    def visit(expression: Any) -> None:
        if not isinstance(expression, relax.Call) or not expression.args:
            return
        if isinstance(function := expression.args[0], tvm.ir.GlobalVar):
            calls[str(function.name_hint)] += 1
        elif isinstance(function, relax.ExternFunc):
            calls[str(function.global_symbol)] += 1

    relax.analysis.post_order_visit(module["main"], visit)
    return dict(sorted(calls.items()))


def _finish() -> Any:
    """Relax's own lowering of calls and memory, as its CPU pipeline does it."""

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, _context: Any) -> Any:
        return tvm.transform.Sequential(
            [
                relax.transform.RewriteDataflowReshape(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )(module)

    return pipeline
