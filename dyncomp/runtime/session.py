"""One interface to whatever computes the next token's logits."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class DecoderSession(Protocol):
    """A batch of sequences that grows token by token.

    Attributes:
        engine: what computes, for reports: ``dyncomp-ort``, ``dyncomp-torch``.
        cached: whether past keys and values are kept; else every step computes the whole sequence again.
        threads: how many it uses.
        context_length: the most tokens a sequence can have; 0 when there is no limit known.
    """

    engine: str
    cached: bool
    threads: int
    context_length: int

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        """Begin new sequences.

        Args:
            ids: [B, S] int64, padded on the right.
            lengths: [B] real tokens of each row, at least 1.
            room: how many tokens may follow.

        Returns:
            [B, V] float32, the logits after each row's last token.
        """

    def step(self, ids: Array) -> Array:
        """Append one token to each sequence: ids [B] -> logits [B, V] float32 (valid until the next call)."""

    def reset(self) -> None:
        """Forget the sequences."""


class Seq2SeqSession(DecoderSession, Protocol):
    """The decoder of an encoder–decoder.

    Attributes:
        reads: names of the encoder's inputs, what is read first.
    """

    reads: tuple[str, ...]

    def encode(self, **inputs: Array) -> None:
        """Run the encoder, once: [B, …] each. The sequences that ``prefill`` begins from then on belong to its rows, in order.

        Raises:
            RequestError: an input is missing, unknown, or has the wrong rank or dtype.
        """


class ExtendableSession(DecoderSession, Protocol):
    """A session whose sequence, when it is a single one, can grow by several tokens at once and shrink again."""

    def extend(self, ids: Array) -> Array:
        """Append tokens [S]; returns the logits [S, V] after each (valid until the next call)."""

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens."""


class Slots(Protocol):
    """Sequences that come and go, over one KV cache. Those at work are in the slots 0, 1, 2 …

    Attributes:
        engine, threads: as of :class:`DecoderSession`.
        slots, capacity: sequences at a time, tokens of each.
        lengths: [slots] tokens in each; the caller may shorten one.
    """

    engine: str
    threads: int
    slots: int
    capacity: int
    lengths: Array

    def extend(self, slot: int, ids: Array) -> Array:
        """Append tokens [S] to the sequence in ``slot``; returns the logits [V] after the last one."""

    def step(self, ids: Array) -> Array:
        """Append one token to each of the first ``len(ids)`` slots; returns logits [n, V], valid until the next call."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let ``target`` begin with the first ``tokens`` tokens of ``source``."""
