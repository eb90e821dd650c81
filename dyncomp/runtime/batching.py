"""Continuous batching: requests join and leave a running batch between two tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyncomp.errors import RequestError
from dyncomp.runtime.generate import Completion, Prompt, encode, end_tokens
from dyncomp.runtime.sampling import Sampler, Sampling
from dyncomp.runtime.session import Array, Slots
from dyncomp.runtime.stream import TextStream

SHORTEST_PREFIX = 16
"""Tokens that a prompt must share with a sequence in the cache for them to be copied."""


@dataclass(eq=False)
class Request:
    """One prompt on its way. Read :attr:`text` and :attr:`finish` at any time; iterate over :meth:`Batcher.stream` to wait.

    Args:
        prompt: its tokens.
        tokens: generated so far.
        finish: None while at work; then ``"end"``, ``"stop"``, ``"length"`` (as in :class:`~dyncomp.runtime.generate.Completion`)
            or ``"cancelled"``.
        reused: prompt tokens whose keys and values were in the cache already.
    """

    prompt: list[int]
    sampling: Sampling
    _stream: TextStream
    _sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    reused: int = 0
    _unread: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What is certain so far."""
        return self._stream.text

    def cancel(self) -> None:
        """Leave the batch before the next token; what was generated stays readable. A finished request stays as it is."""
        if self.finish is None:
            self.finish = "cancelled"


class Batcher:
    """Serves requests over the slots of one session, first come, first served.

    Each call of :meth:`step` lets waiting requests join while there are slots (computing their prompts, or copying what a
    sequence in the cache shares with them), then generates one token for every request at work. A request's tokens are what it
    would get alone, up to the rounding of the batch's kernels.

    Args:
        slots: what computes; the batcher owns it.
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, slots: Slots, tokenizer: Any) -> None:
        self.slots, self.tokenizer = slots, tokenizer
        self._ends = end_tokens(tokenizer)
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []  # request i is in slot i
        self._cached: list[list[int]] = [[] for _ in range(slots.slots)]  # tokens whose keys and values each slot holds
        self._submitted = 0
        self.seconds = (0.0, 0.0)  # computing prompts, and decoding

    def submit(self, prompt: Prompt, sampling: Sampling | None = None) -> Request:
        """Queue a prompt.

        Raises:
            RequestError: the prompt is too long for a slot, or cannot be encoded.
        """
        ids, sampling = encode(self.tokenizer, prompt), sampling or Sampling()
        if len(ids) >= self.slots.capacity:
            raise RequestError(f"the prompt has {len(ids)} tokens, a sequence at most {self.slots.capacity}", hint="shorten the prompt")
        request = Request(ids, sampling, TextStream(self.tokenizer, sampling.stop), Sampler(sampling, self._submitted))
        self._submitted += 1
        self._waiting.append(request)
        return request

    @property
    def idle(self) -> bool:
        """Whether no request waits or is at work."""
        return not self._waiting and not self._active

    def step(self) -> None:
        """Go on by one token boundary."""
        self._leave()
        while self._waiting and len(self._active) < self.slots.slots:
            request = self._waiting.popleft()
            if request.finish is None:
                self._join(request)
        self._leave()  # those whose first token was their last
        if not self._active:
            return
        start = time.perf_counter()
        logits = self.slots.step(np.array([r.tokens[-1] for r in self._active]))
        self.seconds = self.seconds[0], self.seconds[1] + time.perf_counter() - start
        for slot, request in enumerate(self._active):
            self._cached[slot].append(request.tokens[-1])
            self._take(request, slot, logits[slot])

    def run(self) -> None:
        """Until nothing is left to do."""
        while not self.idle:
            self.step()

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Serve these prompts until all are done; as :meth:`~dyncomp.runtime.generate.Generator.generate` for any number of them."""
        requests = [self.submit(p, sampling) for p in prompts]
        before = self.seconds
        self.run()
        seconds = self.seconds[0] - before[0], self.seconds[1] - before[1]
        return [Completion(r.text, tuple(r.tokens), str(r.finish), len(r.prompt), self.slots.engine, True, seconds) for r in requests]

    def stream(self, request: Request) -> Iterator[str]:
        """The text of a request as it comes, the others going on beside it."""
        while True:
            while request._unread:
                yield request._unread.pop(0)
            if request.finish is not None and request not in self._active:
                return
            self.step()

    def _join(self, request: Request) -> None:
        slot = len(self._active)
        source, shared = self._longest_prefix(request.prompt)
        if shared:
            self.slots.copy(source, slot, shared)
        else:
            self.slots.lengths[slot] = 0
        request.reused = shared
        self._cached[slot] = []  # until the prompt is in: an error below leaves an empty slot
        start = time.perf_counter()
        logits = self.slots.extend(slot, np.array(request.prompt[shared:], np.int64))
        self.seconds = self.seconds[0] + time.perf_counter() - start, self.seconds[1]
        self._cached[slot] = list(request.prompt)
        self._active.append(request)
        self._take(request, slot, logits)

    def _longest_prefix(self, prompt: list[int]) -> tuple[int, int]:
        """(slot, tokens) of the sequence that begins most like the prompt; at least its last token is left to compute."""
        best = (0, 0)
        for slot, held in enumerate(self._cached):
            limit = min(len(held), len(prompt) - 1)
            shared = next((i for i in range(limit) if held[i] != prompt[i]), limit)
            if shared >= SHORTEST_PREFIX and shared > best[1]:
                best = (slot, shared)
        return best

    def _take(self, request: Request, slot: int, logits: Array) -> None:
        """Choose a request's next token, and see whether it ends there."""
        if request.finish is not None:
            return
        token = request._sampler.choose(logits)
        request.tokens.append(token)
        if token in self._ends:
            request.finish = "end"
        else:
            if piece := request._stream.push(token):
                request._unread.append(piece)
            full = int(self.slots.lengths[slot]) >= self.slots.capacity
            if request._stream.stopped:
                request.finish = "stop"
            elif len(request.tokens) >= request.sampling.max_tokens or full:
                request.finish = "length"
        if request.finish is not None and (rest := request._stream.finish()):
            request._unread.append(rest)
            if request._stream.stopped:
                request.finish = "stop"

    def _leave(self) -> None:
        """Free the slots of finished requests; the last ones at work move there."""
        slot = 0
        while slot < len(self._active):
            if self._active[slot].finish is None:
                slot += 1
                continue
            last = len(self._active) - 1
            if slot != last:
                held = self._cached[last]
                self.slots.copy(last, slot, len(held))
                self._active[slot], self._cached[slot] = self._active[last], held
                self._cached[last] = []
            self._active.pop()
