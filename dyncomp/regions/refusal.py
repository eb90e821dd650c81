"""What a discovery or a pass did not do, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Something that was looked at and left as it is.

    Args:
        where: module path (or node name) of the thing.
        what: "ffn", "attention", "block", "head", or the name of the pass that refused.
        reason: what was found.
        remedy: what would make it work.
    """

    where: str
    what: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where} ({self.what}): {self.reason}" + (f" -> {self.remedy}" if self.remedy else "")
