"""Capacity: how many tokens an expert may take."""

from __future__ import annotations

from torch import Tensor


def within_capacity(gates: Tensor, factor: float) -> Tensor:
    """``gates`` with those closed that come after an expert's capacity is full, first come first served: [..., S, E] -> [..., S, E].

    The capacity is ``factor`` times an even share of all open gates of a sequence (GShard, 2006.16668; Switch, 2101.03961, section 2.2);
    a token whose experts are all full passes by the FFN. Without a capacity (dropless, MegaBlocks, 2211.15841) every gate stays open.
    """
    opened = (gates != 0).to(gates.dtype)
    room = (opened.sum((-2, -1), keepdim=True) * (factor / gates.shape[-1])).ceil()
    return gates * (opened.cumsum(-2) <= room)
