"""Continuous batching: over slots that need no model, and over a lowered one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends import decoder
from dyncomp.backends.recompute import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ort import with_cache
from test_runtime import END, Bytes

from bench.tiny import enliven, trace_tiny
from dyncomp.deploy import Backend, backend_of
from dyncomp.errors import BackendError, RequestError
from dyncomp.runtime.batching import SHORTEST_PREFIX, Batcher
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampling


class Sums:
    """Slots whose next token depends on every token of the sequence, and which know what they hold."""

    engine, threads = "test", 1

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity, self.lengths = slots, capacity, np.zeros(slots, np.int64)
        self.held = np.full((slots, capacity), -1, np.int64)
        self.computed = 0

    def extend(self, slot: int, ids: Array) -> Array:
        for token in ids:
            self.held[slot, self.lengths[slot]] = token
            self.lengths[slot] += 1
        self.computed += len(ids)
        return self._logits(slot)

    def step(self, ids: Array) -> Array:
        return np.stack([self.extend(slot, np.array([token])) for slot, token in enumerate(ids)])

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.held[target, :tokens] = self.held[source, :tokens]
        self.lengths[target] = tokens

    def _logits(self, slot: int) -> Array:
        return logits_after(self.held[slot, : self.lengths[slot]])


def logits_after(tokens: Array) -> Array:
    assert (tokens >= 0).all()  # nothing is read that was not written
    seed = int((tokens * np.arange(1, len(tokens) + 1)).sum()) % 9973
    logits = np.random.default_rng(seed).normal(size=END + 1).astype(np.float32)
    logits[END] += 1.0
    return logits


def alone(prompt: str, sampling: Sampling) -> tuple[list[int], str]:
    batcher = Batcher(Sums(1, 512), Bytes())
    request = batcher.submit(prompt, sampling)
    batcher.run()
    return request.tokens, request.text


texts = st.text(st.characters(codec="ascii"), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(texts, min_size=1, max_size=9), slots=st.integers(1, 4), joins=st.integers(0, 5), cancelled=st.integers(0, 9))
def test_every_request_gets_what_it_gets_alone(prompts: list[str], slots: int, joins: int, cancelled: int) -> None:
    batcher, sampling = Batcher(Sums(slots, 512), Bytes()), Sampling(max_tokens=24)
    requests = []
    for index, prompt in enumerate(prompts):
        requests.append(batcher.submit(prompt, sampling))
        for _ in range(joins):
            batcher.step()
        if index == cancelled:
            requests[-1].cancel()
    batcher.run()
    assert batcher.idle
    for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        tokens, text = alone(prompt, sampling)
        if index == cancelled:
            assert request.tokens == tokens[: len(request.tokens)]
            continue
        assert request.tokens == tokens
        assert request.text == text
        assert request.finish == ("end" if tokens[-1] == END else "length")


def test_a_prompt_that_is_in_the_cache_is_not_computed_again() -> None:
    slots = Sums(3, 256)
    batcher = Batcher(slots, Bytes())
    system = "You are a careful assistant. Answer in one word. "
    first = batcher.submit(system + "Sky?", Sampling(max_tokens=8))
    batcher.run()
    assert first.reused == 0
    before = slots.computed
    again = batcher.submit(system + "Sea?", Sampling(max_tokens=1))
    batcher.run()
    assert again.reused == len(system) + 1  # the S too
    assert slots.computed - before == len("ea?")
    short = batcher.submit(system[: SHORTEST_PREFIX - 1] + "!", Sampling(max_tokens=1))
    batcher.run()
    assert short.reused == 0
    assert [short.tokens, again.tokens] == [
        alone(p, Sampling(max_tokens=1))[0] for p in (system[: SHORTEST_PREFIX - 1] + "!", system + "Sea?")
    ]


def test_the_same_prompt_twice_leaves_its_last_token_to_compute() -> None:
    batcher = Batcher(Sums(2, 256), Bytes())
    prompt = "the same forty characters, over and over"
    for expected in (0, len(prompt) - 1):
        request = batcher.submit(prompt, Sampling(max_tokens=4))
        batcher.run()
        assert request.reused == expected


def test_a_full_cache_ends_the_text() -> None:
    batcher = Batcher(Sums(2, 12), Bytes())
    request = batcher.submit("nine char", Sampling(max_tokens=50))
    other = batcher.submit("short", Sampling(max_tokens=2))
    batcher.run()
    assert request.finish in ("length", "end")
    assert len(request.tokens) <= 4  # the last token needs no room: nothing follows it
    assert len(other.tokens) <= 2
    with pytest.raises(RequestError, match="the prompt has 12 tokens, a sequence at most 12"):
        batcher.submit("twelve chars")
    assert batcher.idle


def test_an_empty_prompt_without_a_token_to_begin_with() -> None:
    class Endless(Bytes):
        eos_token_id = None

    with pytest.raises(RequestError, match="the prompt is empty"):
        Batcher(Sums(1, 8), Endless()).submit("")


def test_streaming_one_request_moves_the_others() -> None:
    batcher, sampling = Batcher(Sums(2, 256), Bytes()), Sampling(max_tokens=16)
    requests = [batcher.submit(p, sampling) for p in ("one", "two", "three")]
    streamed = "".join(batcher.stream(requests[2]))
    assert streamed == requests[2].text == alone("three", sampling)[1]
    assert requests[0].tokens == alone("one", sampling)[0]


def test_a_request_cancelled_while_it_streams() -> None:
    batcher = Batcher(Sums(1, 256), Bytes())
    first, second = (batcher.submit(p, Sampling(max_tokens=200)) for p in ("cancel me", "go on"))
    for number, _ in enumerate(batcher.stream(first)):
        if number == 2:
            first.cancel()
    assert first.finish in ("cancelled", "end")
    batcher.run()
    assert second.tokens == alone("go on", Sampling(max_tokens=200))[0]
    waiting = batcher.submit("never", Sampling(max_tokens=4))
    waiting.cancel()
    batcher.run()
    assert waiting.tokens == []
    assert waiting.finish == "cancelled"


# ---- a lowered model -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["ort", "tvm"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, Any]:
    """A backend, and a small model in it."""
    pytest.importorskip({"ort": "onnxruntime", "tvm": "tvm"}[request.param])
    graph, used = trace_tiny("llama"), backend_of(request.param)
    enliven(graph.module, 1)
    folder = tmp_path_factory.mktemp("slots")
    used.lower(with_cache(graph, context=96), folder)
    return used, used.open(folder, threads=1)


class Modulo(Bytes):
    """Bytes for a vocabulary smaller than 256."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [b % 60 for b in text.encode()]}


def test_a_lowered_model_serves_as_it_generates(lowered: tuple[Backend, Any]) -> None:
    used, model = lowered
    prompts = ["a first prompt, somewhat long", "b", "a first prompt, somewhat else", "the fourth", "and a fifth one"]
    sampling = Sampling(max_tokens=10)
    expected = [Generator(used.session(model), Modulo()).generate([p], sampling)[0] for p in prompts]
    batcher = Batcher(used.slots(model, slots=3, capacity=61), Modulo())
    assert batcher.complete(prompts, sampling) == expected
    assert batcher.slots.lengths.max() <= 61
    assert batcher.slots.engine == f"dyncomp-{used.name}"


def test_slots_continue_and_copy(lowered: tuple[Backend, Any]) -> None:
    used, model = lowered
    ids = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(0)).numpy()
    slots = used.slots(model, slots=2, capacity=48)
    whole = slots.extend(0, ids)
    slots.copy(0, 1, 30)
    assert np.allclose(slots.extend(1, ids[30:]), whole, atol=1e-4 * np.abs(whole).max())
    both = slots.step(np.array([7, 7]))
    assert np.allclose(both[0], both[1], atol=1e-4 * np.abs(both).max())
    assert slots.bytes_per_token == sum(c.nbytes for c in slots._caches) // 96
    with pytest.raises(RequestError, match="exceed the capacity of 48"):
        slots.extend(0, ids)
    for _ in range(7):
        slots.step(np.array([1, 1]))
    with pytest.raises(RequestError, match="fills its capacity"):
        slots.step(np.array([1, 1]))


@pytest.mark.parametrize(("slots", "capacity"), [(0, 32), (2, 1), (2, 97)])
def test_slots_that_cannot_be(lowered: tuple[Backend, Any], slots: int, capacity: int) -> None:
    used, model = lowered
    with pytest.raises(RequestError):
        used.slots(model, slots=slots, capacity=capacity)


def test_long_prompts_go_in_pieces(lowered: tuple[Backend, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    used, model = lowered
    ids = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(1)).numpy()
    whole = used.slots(model, slots=3, capacity=43).extend(1, ids)
    monkeypatch.setattr(decoder, "CHUNK", 7)
    pieces = used.slots(model, slots=3, capacity=43)
    assert np.allclose(pieces.extend(2, ids), whole, atol=1e-4 * np.abs(whole).max())
    assert pieces.lengths.tolist() == [0, 0, 40]


def test_a_model_without_a_cache_has_no_slots(lowered: tuple[Backend, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    used, model = lowered
    monkeypatch.delitem(model.config, "kv_cache")
    with pytest.raises(BackendError, match="no KV cache"):
        used.slots(model, slots=1, capacity=8)
