"""Text that a model writes of itself: to calibrate on and to heal with where there is none like what it will read."""

from __future__ import annotations

import random

from dyncomp.errors import TextError
from dyncomp.pipeline import Progress, no_progress
from dyncomp.runtime.batching import Batcher
from dyncomp.runtime.sampling import Sampling

SHORTEST = 16
"""Tokens of a document that is kept."""
_WAVES = 20


def write_documents(batcher: Batcher, *, tokens: int, length: int, seed: int = 0, progress: Progress = no_progress) -> list[str]:
    """Documents of at least ``tokens`` tokens together.

    Each begins with a random token of the vocabulary and goes on by chance, after the model's own probabilities, to the model's end of
    text or ``length`` tokens (data-free distillation as in LLM-QAT, 2305.17888).

    Raises:
        TextError: the model ends its texts at once.
    """
    tokenizer, pick = batcher.tokenizer, random.Random(seed)
    sampling, special = Sampling(max_tokens=length - 1, temperature=1.0, seed=seed), set(tokenizer.all_special_ids)
    beginnings = [t for t in range(len(tokenizer)) if t not in special]
    documents: list[str] = []
    done = 0
    for _ in range(_WAVES):
        wave = [batcher.submit(tokenizer.decode([pick.choice(beginnings)]), sampling) for _ in range(-(-(tokens - done) // length))]
        before = done
        while not batcher.idle:
            batcher.step()
            progress("generated text", min(tokens, before + sum(len(r.tokens) for r in wave)), tokens)
        for request in wave:
            if len(request.tokens) >= SHORTEST and request.text.strip():
                documents.append(tokenizer.decode(request.prompt) + request.text)
                done += len(request.tokens)
        if done >= tokens:
            return documents
    raise TextError(
        f"the model ends its texts at once: {done} tokens in {_WAVES} attempts to get {tokens}", hint="give a text that it would read"
    )
