"""What an attention's mask allows, recognised by evaluating it at a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph

_SHORT = 17  # a length at which every kind of mask shows itself, but for long windows
_LARGEST_WINDOW = 8192
_MASKED = -1e4  # an additive mask at or below this hides a position: exp(-1e4) is 0 in every float format


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    Args:
        kind: ``"none"`` everything; ``"causal"`` its own position and those before it; ``"relative"`` these too, and a number is added
            that depends on how far back a key lies (ALiBi, T5's relative positions), but for what is the same for all keys of a query;
            ``"bias"`` another number that depends on the positions; ``"given"`` depends on the values of the inputs (padding);
            ``"other"`` anything else.
        window: with ``"causal"``, a query sees its own position and the ``window - 1`` before it; 0 means all.
    """

    kind: str
    window: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, window {self.window}" if self.window else self.kind


def classify_mask(additive: Callable[[int], Tensor], literals: Iterable[int], context_length: int = 0) -> Mask:
    """Recognise a mask that depends on shapes only.

    Args:
        additive: sequence length S -> what is added to the scores, [B or 1, H or 1, S, S]; 0 is visible.
        literals: integers that occur in the nodes that make the mask: among them is the window, if there is one.
        context_length: the longest sequence of interest; a window not shorter than it hides nothing.
    """
    mask = _classify_one(additive(_SHORT))
    shorter = [additive(size) for size in (1, 3)]
    if mask.kind == "relative":
        bias = relative_bias(additive(_SHORT))
        short = relative_bias(shorter[1])
        return mask if bias is not None and short is not None and _close(short, bias[:, :3]) else Mask("bias")
    if any(_classify_one(m) != _seen_at(mask, m.shape[-1]) for m in shorter):
        return mask if mask.kind == "bias" else Mask("other")
    if mask != Mask("causal"):
        return mask
    longest = context_length or 2**31
    windows = [abs(n) for n in literals if _SHORT <= abs(n) < longest]
    affordable = [n for n in windows if n <= _LARGEST_WINDOW]
    if affordable:
        mask = _classify_one(additive(max(affordable) + 3))
    if mask == Mask("causal") and len(affordable) < len(windows):
        return Mask("other")  # a window may start beyond the longest mask that is affordable to look at
    return mask


def _seen_at(mask: Mask, length: int) -> Mask:
    """What ``mask`` looks like on a sequence of this length."""
    if length == 1 and mask.kind in ("none", "causal"):
        return Mask("causal")
    return Mask("causal") if mask.window >= length else mask


def _classify_one(mask: Tensor) -> Mask:
    length = mask.shape[-1]
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    rows = mask.flatten(0, 1)  # [B * H, S, S]
    if relative_bias(mask) is not None:
        return Mask("relative")
    if rows.shape[0] > 1 and bool((rows[1:] != rows[:1]).any()):
        return Mask("bias" if mask.is_floating_point() else "other")
    values = rows[0]
    hidden, visible = values <= _MASKED, values == 0
    if not bool((hidden | visible).all()):
        return Mask("bias")
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]  # query - key
    if bool(visible.all()) and length > 1:
        return Mask("none")
    if bool((visible == (distance >= 0)).all()):
        return Mask("causal")
    window = int(visible[-1].sum())
    if bool((visible == ((distance >= 0) & (distance < window))).all()):
        return Mask("causal", window)
    return Mask("other")


def relative_bias(mask: Tensor) -> Tensor | None:
    """What an additive mask [B, H, S, S] adds to the score of a key 0, 1 … S - 1 positions back, less what it adds to a query's own
    position: [H, S]. None when it is no causal mask of this kind, or adds nothing."""
    length, mask = mask.shape[-1], mask[(None,) * (4 - mask.dim())]
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]  # query - key
    seen = distance >= 0
    if not mask.is_floating_point() or bool(((mask <= _MASKED) == seen).any()):
        return None
    mask = mask - mask.diagonal(dim1=2, dim2=3)[..., None]  # a number for all keys of a query does not change its softmax
    bias = mask[0, :, -1].flip(-1)  # the last query sees every distance
    wanted = torch.where(seen, bias[:, distance.clamp_min(0)], 0.0)
    return bias if bool(bias.any()) and _close(torch.where(seen, mask, 0.0), wanted) else None


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(float(expected.abs().max()), 1e-30))


def integer_literals(graph: Graph, nodes: Iterable[fx.Node]) -> set[int]:
    """Every integer written in the arguments of the given nodes, or held by the scalar constants among them."""
    found: set[int] = set()

    def visit(value: object) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, float):
            if 0 < value < 2**31 and value.is_integer():  # a negative float is what hides a position
                found.add(int(value))
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31:
            found.add(value)

    for node in nodes:
        if node.op == "get_attr":
            constant = graph.tensor(node)
            visit(constant.item() if constant.numel() == 1 and not constant.is_meta else None)
        visit(node.args)
        visit(tuple(node.kwargs.values()))
    return found
