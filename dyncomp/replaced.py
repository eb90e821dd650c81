"""Functions of other packages replaced for a while by ones that do the same faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

Replacement = tuple[Any, str, Any]
"""The owner, the attribute's name, its value for a while."""


@contextlib.contextmanager
def replaced(*replacements: Replacement) -> Iterator[None]:
    """Attributes have other values inside, and their own again after.

    Raises:
        AttributeError: an owner has no such attribute; nothing is changed.
    """
    originals = [getattr(owner, attribute) for owner, attribute, _ in replacements]
    try:
        for owner, attribute, value in replacements:
            setattr(owner, attribute, value)
        yield
    finally:
        for (owner, attribute, _), value in zip(replacements, originals, strict=True):
            setattr(owner, attribute, value)
