"""Constant folding, and the rewrites that torch.onnx's translations of our graphs need.

``torch.onnx.export(optimize=True)`` tries 46 rules on every node. Most of them are for convolutions, clips and batch norms and never
match here, at a quarter of the time of a lowering.
"""

from __future__ import annotations

from typing import Any

_RULES = (
    "add_0", "sub_0", "mul_by_1", "div_by_1", "cast_cast", "no_op_cast", "no_op_expand", "no_op_transpose", "transpose_transpose",
    "reshape_reshape", "squeeze_reshape_1d", "unsqueeze_unsqueeze", "materialize_reshape_shape",
)  # fmt: skip
"""Of :mod:`onnxscript.rewriter.rules.common`."""
_COMMUTATIVE = ("add_0", "mul_by_1")
_ROUNDS = 2  # folding makes rules match, and the other way round


def simplify(model: Any) -> None:
    """Simplify an ``onnx_ir.Model`` in place."""
    import onnx_ir.passes.common as common
    from onnx_ir.passes import Sequential
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    chosen: list[Any] = []
    for name in _RULES:
        rule = getattr(rules, f"{name}_rule")
        chosen += rule.commute() if name in _COMMUTATIVE else [rule]
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(model, chosen)
    rewriter.rewrite(_small_model(), chosen)  # the rules remember the last node they saw, and so its model with all its weights
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(), common.OutputFixPass(), common.NameFixPass(),
    )(model)  # fmt: skip


def _small_model() -> Any:
    """An ``onnx_ir.Model`` of one node."""
    import onnx_ir

    x = onnx_ir.Value(name="x")
    node = onnx_ir.Node("", "Identity", [x])
    return onnx_ir.Model(onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
