"""``torch.onnx.export`` without what it does again at every call and every node.

Each call reads the sources of 497 translations for their signatures, lists every registered operator twice for its table of
decompositions, and runs every node on fake tensors to learn the dtypes of operands, which the nodes say: together two thirds of its time.
Should the exporter stop using the three functions replaced here, this changes nothing.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from torch import fx

from dyncomp.replaced import Replacement


@functools.cache
def made_once() -> tuple[Replacement, ...]:
    """What :func:`~dyncomp.replaced.replaced` takes; nothing for another version of PyTorch."""
    try:
        from torch.onnx._internal.exporter import _decomp, _registration
        from torch.onnx._internal.fx.passes import type_promotion

        make, promotion = _decomp.create_onnx_friendly_decomposition_table, type_promotion._TypePromotionInterpreter
        table = functools.cache(make)
        registry = SimpleNamespace(from_torchlib=functools.cache(_registration.ONNXRegistry.from_torchlib))
    except (ImportError, AttributeError):
        return ()

    class Promotion(promotion):  # type: ignore[misc, valid-type]
        """Casts the operands that need it; a node's value is the one it has."""

        def run_node(self, n: fx.Node) -> Any:
            if n.op != "call_function":
                return super().run_node(n)
            if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
                with self._set_current_node(n):
                    self._maybe_promote_node(n, rule)
            return n.meta.get("val")  # an assertion has none

    return (
        (_decomp, "create_onnx_friendly_decomposition_table", lambda operators: table(frozenset(operators))),
        (_registration, "ONNXRegistry", lambda: registry),
        (type_promotion, "_TypePromotionInterpreter", Promotion),
    )
