"""Word errors: how many words of a transcript are wrong."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text as they are compared: in lower case, without punctuation but apostrophes inside words; a hyphen divides."""
    return _WORD.findall(text.lower().replace("’", "'"))


def word_errors(said: str, written: str) -> int:
    """Words to be replaced, left out or put in to make one text of the other (Levenshtein, 1966)."""
    a, b = words(said), words(written)
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]
