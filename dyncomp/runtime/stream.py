"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder puts for the bytes of a character that is not complete yet


class TextStream:
    """Turns tokens into pieces of text that, joined, are the text of all of them.

    A token may hold a part of a character, and may decode differently after another one: text is given out only once it
    cannot change any more. Text that could be the beginning of a stop string is held back until that is known.

    Args:
        tokenizer: has ``decode(ids, skip_special_tokens=…)``.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = self._given = 0  # tokens from start on give context; up to given they have been given out
        self._held = ""
        self.stopped = False
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain. Sets :attr:`stopped` at a stop string."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._given])) :]
        self._given = len(self._ids)
        piece = self._release(rest) if rest else ""
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, piece: str) -> str:
        held = self._held + piece
        found = [at for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            held = held[: min(found)]
            self.text += held
            return held
        keep = max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        out, self._held = (held[: len(held) - keep], held[len(held) - keep :])
        self.text += out
        return out
