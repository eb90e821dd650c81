"""Generation, sampling, streaming, and the measurements; mostly over sessions that need no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.recompute import Array, Recompute
from dyncomp.backends.torch.decoder import decoder_for as torch_decoder_for
from scipy.stats import chisquare
from test_ort import OrtModel, carve, lower, with_cache

from bench.tiny import trace_tiny
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.hardware import default_threads, detect
from dyncomp.runtime.bench import Variant, bench, operator_times
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampler, Sampling
from dyncomp.runtime.session import DecoderSession
from dyncomp.runtime.stream import TextStream

END = 256


class Bytes:
    """A tokenizer whose tokens are bytes: every character beyond ASCII comes in several tokens."""

    eos_token_id: int | None = END
    bos_token_id: int | None = None
    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def recite(text: str, *, context: int = 0) -> Recompute:
    """A session that says ``text`` after any prompt of one token, then ends."""
    said = [*text.encode(), END]

    def logits(ids: Array) -> Array:
        out = np.zeros((*ids.shape, END + 1), np.float32)
        for position in range(ids.shape[1]):
            out[:, position, said[min(position, len(said) - 1)]] = 1
        return out

    return Recompute(logits, engine="test", threads=1, context_length=context)


# ---- streaming -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["plain", "naïve café", "漢字 and 🦊🦊", "a\nb\n"])
def test_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    pieces = list(Generator(recite(text), Bytes()).stream("x", Sampling(max_tokens=200)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1


def test_an_unfinished_character_at_the_end_is_given_out_as_it_is() -> None:
    (done,) = Generator(recite("a🦊"), Bytes()).generate(["x"], Sampling(max_tokens=3))
    assert done.text.startswith("a")
    assert done.finish == "length"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("one two three", ("two",), "one "), ("one two three", ("ee", "t"), "one "), ("aab", ("ab",), "a"), ("abcabd", ("abd",), "abc"),
     ("no stop here", ("xyz",), "no stop here"), ("ends with ab", ("abc",), "ends with ab"), ("🦊 fox", (" ",), "🦊")],
)  # fmt: skip
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str) -> None:
    generator, sampling = Generator(recite(text), Bytes()), Sampling(max_tokens=99, stop=stop)
    (done,) = generator.generate(["x"], sampling)
    assert done.text == expected == "".join(generator.stream("x", sampling))
    assert done.finish == ("stop" if expected != text else "end")


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Bytes(), ["STOP"])
    assert [stream.push(b) for b in b"aST"] == ["a", "", ""]
    assert stream.push(ord("X")) == "STX"
    assert stream.finish() == ""
    assert stream.text == "aSTX"


# ---- prompts -------------------------------------------------------------------------------------------------------
def test_empty_prompt_begins_with_the_tokenizers_first_token() -> None:
    tokenizer = Bytes()
    assert Generator(recite(""), tokenizer).encode("") == [END]
    tokenizer.bos_token_id = 7
    assert Generator(recite(""), tokenizer).encode("") == [7]
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(RequestError, match="the prompt is empty"):
        Generator(recite(""), tokenizer).encode("")


def test_conversations_need_a_template() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Generator(recite(""), Bytes()).encode([{"role": "user", "content": "hello"}])


def test_prompts_and_the_context() -> None:
    generator = Generator(recite("abcdefgh", context=6), Bytes())
    with pytest.raises(RequestError, match="the prompt has 6 tokens, the model's context 6"):
        generator.generate(["123456"])
    (done,) = generator.generate(["x"], Sampling(max_tokens=50))
    assert (done.text, done.finish) == ("abcde", "length")
    assert generator.generate([]) == []


# ---- sampling ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"stop": ("",)}]
)  # fmt: skip
def test_sampling_options_are_checked(options: dict) -> None:
    with pytest.raises(RequestError, match="cannot sample so"):
        Sampling(**options)


def draw(sampling: Sampling, logits: list[float], n: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    counts = np.bincount([sampler.choose(np.array(logits, np.float32)) for _ in range(n)], minlength=len(logits))
    return counts / n


def test_sampling_follows_the_distribution() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (1.0, 0.5):
        expected = torch.softmax(torch.tensor(logits) / temperature, -1).numpy()
        assert np.abs(draw(Sampling(temperature=temperature), logits) - expected).max() < 0.03
    assert draw(Sampling(temperature=0), logits, 5)[2] == 1
    assert draw(Sampling(temperature=1e-3), logits, 50)[2] == 1


def test_top_k_and_top_p() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]  # probabilities .09 .24 .64 .03
    assert (draw(Sampling(temperature=1, top_k=2), logits) > 0).tolist() == [False, True, True, False]
    assert (draw(Sampling(temperature=1, top_p=0.6), logits) > 0).tolist() == [False, False, True, False]
    assert (draw(Sampling(temperature=1, top_p=0.7), logits) > 0).tolist() == [False, True, True, False]
    assert (draw(Sampling(temperature=1, top_p=0.95), logits) > 0).tolist() == [True, True, True, False]


def plain_probabilities(sampling: Sampling, logits: np.ndarray) -> np.ndarray:
    """The definition, in float64 and with the whole vocabulary sorted."""
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")[: sampling.top_k or None]
    total = np.exp(scores[order] - scores.max()).cumsum()
    order = order[: int(np.searchsorted(total, sampling.top_p * total[-1])) + 1]
    weights = np.zeros(len(scores))
    weights[order] = np.exp(scores[order] - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 40}, {"top_k": 40, "top_p": 0.8}, {"top_k": 9999}]
)  # fmt: skip
def test_a_large_vocabulary_is_sampled_by_the_definition(options: dict[str, Any], spread: float) -> None:
    sampling, random = Sampling(temperature=0.8, **options), np.random.default_rng(7)
    logits = random.standard_normal(5_003).astype(np.float32) * spread
    logits[::3] = logits[::3].round(1)  # equal ones
    logits[[0, 17, -1]] = -np.inf
    expected = plain_probabilities(sampling, logits)
    points = np.random.default_rng([sampling.seed, 0])  # a sampler's random numbers
    sampler, seen = Sampler(sampling), logits.copy()
    for _ in range(300):
        assert sampler.choose(logits) == np.searchsorted(expected.cumsum(), points.random(), side="right")
    assert np.array_equal(logits, seen)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.85}, {"top_k": 6}, {"top_k": 9, "top_p": 0.9}])
def test_what_is_drawn_is_distributed_as_defined(options: dict[str, Any]) -> None:
    sampling, logits = Sampling(temperature=1.3, **options), np.random.default_rng(3).standard_normal(14).astype(np.float32)
    expected = plain_probabilities(sampling, logits)
    counts = draw(sampling, list(logits), 20_000) * 20_000
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0], expected[expected > 0] * 20_000).pvalue > 0.01


def test_of_equal_tokens_the_first_are_kept() -> None:
    assert (draw(Sampling(temperature=1, top_k=2), [1.0, 0.0, 1.0, 1.0]) > 0).tolist() == [True, False, True, False]
    assert (draw(Sampling(temperature=1, top_p=0.4), [0.0, 0.0, 0.0, 0.0]) > 0).tolist() == [True, True, False, False]


def test_the_seed_decides() -> None:
    generator = Generator(torch_decoder_for(with_cache(trace_tiny("llama"))), Numbers())
    first, again, other = (generator.generate(["ab"], Sampling(max_tokens=12, temperature=1, seed=s))[0].tokens for s in (1, 1, 2))
    assert first == again != other


# ---- whole sessions ------------------------------------------------------------------------------------------------
class Numbers(Bytes):
    """Letters to small token ids, for the tiny models of 96 tokens; never ends."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % 90 for c in text]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"{i} " for i in ids)


PROMPTS = ["abcdefg", "a", "some longer prompt here", "xyz"]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DecoderSession]:
    plain = trace_tiny("mistral")
    carve(plain, 4, threshold=0.2)
    plain.info |= {"task": "causal-lm", "context_length": 64}
    cached = with_cache(plain)
    made: dict[str, DecoderSession] = {"torch": torch_decoder_for(cached), "torch, recomputed": torch_decoder_for(plain)}
    for name, graph in (("ort", cached), ("ort, recomputed", plain)):
        folder = tmp_path_factory.mktemp("runtime")
        lower(graph, folder)
        made[name] = decoder_for(OrtModel(folder, threads=1))
    return made


def test_every_session_says_the_same(sessions: dict[str, DecoderSession]) -> None:
    results = {name: Generator(s, Numbers()).generate(PROMPTS, Sampling(max_tokens=20)) for name, s in sessions.items()}
    for name, done in results.items():
        assert [d.tokens for d in done] == [d.tokens for d in results["torch"]], name
        assert all(d.cached == ("recomputed" not in name) and d.finish == "length" for d in done)


@pytest.mark.parametrize("name", ["torch", "ort", "ort, recomputed"])
def test_a_batch_gives_what_each_prompt_gives_alone(sessions: dict[str, DecoderSession], name: str) -> None:
    generator = Generator(sessions[name], Numbers())
    together = generator.generate(PROMPTS, Sampling(max_tokens=16))
    assert together == [generator.generate([p], Sampling(max_tokens=16))[0] for p in PROMPTS]
    assert [d.prompt_tokens for d in together] == [len(p) for p in PROMPTS]


# ---- measuring -----------------------------------------------------------------------------------------------------
def test_bench_entries(sessions: dict[str, DecoderSession]) -> None:
    entries = bench([Variant(sessions["ort"], "converted"), Variant(sessions["torch"], "dense")], prompt_tokens=20, context=4,
                    decode_tokens=13, rounds=1, vocabulary=90)  # fmt: skip
    assert [e["engine"] for e in entries] == ["dyncomp-ort", "dyncomp-torch"]
    assert set(entries[0]) == {
        "engine",
        "variant",
        "precision",
        "threads",
        "batch",
        "decode_tokens_per_s",
        "prefill_tokens_per_s",
        "prefill_tokens",
    }
    assert all(e["decode_tokens_per_s"] > 0 and e["prefill_tokens_per_s"] > 0 and e["prefill_tokens"] == 20 for e in entries)


def test_a_profile_by_operator_and_by_region(tmp_path: Path) -> None:
    graph: Graph = trace_tiny("llama")
    carve(graph, 4, k=1)
    lower(with_cache(graph), tmp_path, native=False)
    model = OrtModel(tmp_path, threads=1, profile=tmp_path / "profile")
    session = decoder_for(model)
    session.prefill(np.array([[7]]), np.array([1]), 5)
    for token in range(5):
        session.step(np.array([token]))
    profile = model.end_profiling()
    assert {"MoE", "GroupQueryAttention", "MatMul"} <= operator_times(profile).keys()
    grouped = operator_times(profile, groups={r"\.mlp": "ffn", r"\.self_attn": "attention"})
    assert "MoE" not in grouped
    assert grouped["ffn"] > 0


def test_time_inside_a_branch_is_counted_once(tmp_path: Path) -> None:
    def event(name: str, op: str, start: int, duration: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}

    runs = [event("a", "MatMul", t, 1000) for t in (0, 10_000)] + [event("if", "If", t + 2000, 3000) for t in (0, 10_000)]
    branch = [event("inner", "Mul", 2500, 2000)]  # taken in the first run only
    (tmp_path / "p.json").write_text(json.dumps([*runs, *branch, {"cat": "Session", "name": "model_run", "ts": 0, "dur": 1}]))
    assert operator_times(tmp_path / "p.json") == {"If": pytest.approx(2.0), "MatMul": pytest.approx(1.0), "Mul": pytest.approx(1.0)}


def test_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    found = detect()
    assert found.cores >= 1
    assert found.architecture
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert default_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert default_threads() <= 100000
    assert default_threads() == detect().cores
