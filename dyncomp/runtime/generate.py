"""Text generation over any decoder session: one prompt or a batch, greedy or sampled, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyncomp.errors import RequestError
from dyncomp.runtime.sampling import Sampler, Sampling
from dyncomp.runtime.session import Array, DecoderSession, Seq2SeqSession
from dyncomp.runtime.stream import TextStream

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or the messages of a conversation: ``[{"role": "user", "content": "…"}]``."""


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Args:
        text: without the prompt, the stop string and special tokens.
        tokens: every token generated, with the one that ended the text.
        finish: ``"end"`` the model ended the text, ``"stop"`` a stop string, ``"length"`` the limit or the context was reached.
        prompt_tokens: length of the prompt, or of what the encoder read.
        cached: False when the model has no KV cache and each step computed the whole sequence.
        seconds: prefill and decode, of the whole batch.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    engine: str
    cached: bool
    seconds: tuple[float, float] = field(default=(0.0, 0.0), compare=False)


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text."""
    ends = getattr(tokenizer, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt; messages go through the tokenizer's chat template. An empty text becomes the beginning-of-text token.

    Raises:
        RequestError: messages without a template, or an empty prompt for a tokenizer without such a token.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif not getattr(tokenizer, "chat_template", None):
        raise RequestError("the prompt is a conversation, but the tokenizer has no chat template", hint="give plain text instead")
    else:
        text = tokenizer.apply_chat_template([dict(m) for m in prompt], tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        begin = getattr(tokenizer, "bos_token_id", None)
        begin = getattr(tokenizer, "eos_token_id", None) if begin is None else begin
        if begin is None:
            raise RequestError("the prompt is empty, and the tokenizer has no token to begin a text with", hint="give some text")
        ids = [int(begin)]
    return ids


class Generator:
    """Generates text.

    Args:
        session: what computes the logits.
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, session: DecoderSession, tokenizer: Any) -> None:
        self.session, self.tokenizer = session, tokenizer
        self._never: list[int] = []
        self._never_first: list[int] = []
        self._ends = end_tokens(tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """See :func:`encode`."""
        return encode(self.tokenizer, prompt)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Complete every prompt, as one batch; greedy results equal those of each prompt alone."""
        if not prompts:
            return []
        run = _Run(self, [self.encode(p) for p in prompts], sampling or Sampling())
        for _ in run:
            pass
        return run.completions()

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Complete one prompt; yields the text as it comes."""
        run = _Run(self, [self.encode(prompt)], sampling or Sampling())
        for pieces in run:
            if pieces[0]:
                yield pieces[0]


Source = str | Mapping[str, Array]
"""What an encoder reads: text, or its inputs by name, each without the batch dimension (``{"input_features": [mel bins, frames]}``)."""


class Seq2SeqGenerator:
    """Generates text with an encoder–decoder: what is read goes to the encoder, the decoder begins with ``begin``.

    Args:
        session: what computes the logits.
        tokenizer: a Hugging Face tokenizer.
        begin: the tokens that every text begins with: ``decoder_start_token_id`` and what the model wants after it.
        never: tokens that are never chosen; ``never_first``: nor as the first one.
    """

    def __init__(
        self, session: Seq2SeqSession, tokenizer: Any, begin: Sequence[int], *, never: Sequence[int] = (), never_first: Sequence[int] = ()
    ) -> None:
        if not begin:
            raise RequestError("a decoder begins with at least one token", hint="give the model's decoder_start_token_id")
        self.session, self.tokenizer, self._begin = session, tokenizer, list(begin)
        self._never, self._never_first = list(never), list(never_first)
        self._ends = end_tokens(tokenizer)

    def generate(self, sources: Sequence[Source], sampling: Sampling | None = None) -> list[Completion]:
        """What is written for each source: as one batch where all have the same shapes, else one after the other, since nothing hides
        the padding from an encoder without a mask."""
        read = [self._inputs(source) for source in sources]
        alike = len({tuple((name, np.shape(value)) for name, value in sorted(r.items())) for r in read}) == 1
        batches = [read] if alike else [[r] for r in read]
        found: list[Completion] = []
        for batch in batches:
            run = self._run(batch, sampling or Sampling())
            for _ in run:
                pass
            found += run.completions()
        return found

    def stream(self, source: Source, sampling: Sampling | None = None) -> Iterator[str]:
        """Write for one source; yields the text as it comes."""
        for pieces in self._run([self._inputs(source)], sampling or Sampling()):
            if pieces[0]:
                yield pieces[0]

    def _inputs(self, source: Source) -> Mapping[str, Array]:
        if not isinstance(source, str):
            return source
        ids = np.array(encode(self.tokenizer, source), np.int64)
        return {name: np.ones_like(ids) if name == "attention_mask" else ids for name in self.session.reads}

    def _run(self, batch: Sequence[Mapping[str, Array]], sampling: Sampling) -> _Run:
        start = time.perf_counter()
        self.session.encode(**{name: np.stack([np.asarray(r[name]) for r in batch]) for name in batch[0]})
        run = _Run(self, [self._begin] * len(batch), sampling)
        run.read, run.seconds[0] = np.shape(batch[0][self.session.reads[0]])[-1], time.perf_counter() - start
        return run


class _Run:
    """One batch from prefill to the end. Iterating yields, after each step, the new text of each row."""

    def __init__(self, generator: Generator | Seq2SeqGenerator, prompts: list[list[int]], sampling: Sampling) -> None:
        self._session, self._ends, self._sampling = generator.session, generator._ends, sampling
        self._prompts = prompts
        self._never, self._never_first = generator._never, generator._never_first
        longest, context = max(map(len, prompts)), self._session.context_length
        if context and longest >= context:
            raise RequestError(f"the prompt has {longest} tokens, the model's context {context}", hint="shorten the prompt")
        self._room = min(sampling.max_tokens, context - longest) if context else sampling.max_tokens
        self._limits = [min(sampling.max_tokens, context - len(p)) if context else sampling.max_tokens for p in prompts]
        self._streams = [TextStream(generator.tokenizer, sampling.stop) for _ in prompts]
        self._samplers = [Sampler(sampling, row) for row in range(len(prompts))]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._finish: list[str | None] = [None] * len(prompts)
        self.seconds = [0.0, 0.0]
        self.read: int | None = None  # length of what an encoder read

    def __iter__(self) -> Iterator[list[str]]:
        lengths = np.array([len(p) for p in self._prompts])
        ids = np.zeros((len(lengths), int(lengths.max())), np.int64)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt)] = prompt
        start = time.perf_counter()
        logits = self._session.prefill(ids, lengths, self._room)
        self.seconds[0] += time.perf_counter() - start
        for step in range(self._room):
            pieces = self._advance(logits)
            if any(pieces):
                yield pieces
            if all(self._finish) or step + 1 == self._room:
                break
            start = time.perf_counter()
            logits = self._session.step(np.array([t[-1] for t in self._tokens]))
            self.seconds[1] += time.perf_counter() - start
        yield [self._end(row) for row in range(len(lengths))]

    def _advance(self, logits: Array) -> list[str]:
        pieces = []
        for row, stream in enumerate(self._streams):
            if self._finish[row] is not None:  # a finished row goes along with the batch; its tokens are not looked at
                pieces.append("")
                continue
            token = self._samplers[row].choose(self._allowed(logits[row], first=not self._tokens[row]))
            self._tokens[row].append(token)
            piece = "" if token in self._ends else stream.push(token)
            if token in self._ends:
                self._finish[row] = "end"
            elif stream.stopped:
                self._finish[row] = "stop"
            elif len(self._tokens[row]) >= self._limits[row]:
                self._finish[row] = "length"
            pieces.append(piece)
        return pieces

    def _allowed(self, logits: Array, *, first: bool) -> Array:
        hidden = self._never + (self._never_first if first else [])
        if hidden:
            logits = logits.copy()
            logits[hidden] = -np.inf
        return logits

    def _end(self, row: int) -> str:
        piece = self._streams[row].finish()
        if self._streams[row].stopped:
            self._finish[row] = "stop"
        self._finish[row] = self._finish[row] or "length"
        return piece

    def completions(self) -> list[Completion]:
        return [
            Completion(stream.text, tuple(tokens), str(finish), self.read or len(prompt), self._session.engine,
                       self._session.cached, (self.seconds[0], self.seconds[1]))
            for stream, tokens, finish, prompt in zip(self._streams, self._tokens, self._finish, self._prompts, strict=True)
        ]  # fmt: skip
