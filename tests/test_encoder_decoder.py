"""Encoder–decoders: the encoder runs once, the decoder has a KV cache, and both write what the module writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.ort.slots import OrtSlots
from dyncomp.backends.torch.decoder import TorchDecoder
from dyncomp.passes import AddKVCache, Quantize, Sparsify
from dyncomp.passes.split_encoder import encode, split_encoder
from helpers import assert_close
from test_runtime import Numbers
from torch import Tensor, nn

from bench.tiny import built, sample, tokens, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.deploy import with_cache
from dyncomp.errors import BackendError, RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions.tokens import token_input
from dyncomp.runtime.generate import Seq2SeqGenerator
from dyncomp.runtime.sampling import Sampling
from dyncomp.trace import trace

NAMES = ["t5_whole", "whisper_whole"]
STEPS = 10


def cached(name: str) -> Graph:
    graph = trace_tiny(name)
    graph.info |= {"task": "seq2seq", "context_length": 64}
    made, refused = with_cache(graph)
    assert not refused, refused
    return made


def read(name: str, batch: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    _, inputs, dims = built(name)
    return {k: v.numpy() for k, v in sample(inputs, dims, {"batch": batch, "sequence": 9}, 3).items() if k != "decoder_input_ids"}


def written(name: str, inputs: dict[str, np.ndarray[Any, Any]], begin: list[int]) -> list[list[int]]:
    """What the module's own ``generate`` writes, greedily."""
    model = built(name)[0].model
    ids = torch.tensor([begin] * len(next(iter(inputs.values()))))
    out = model.generate(
        **{k: torch.as_tensor(v) for k, v in inputs.items()}, decoder_input_ids=ids, max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, num_beams=1, eos_token_id=None, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return [row[-STEPS:].tolist() for row in out]


@pytest.mark.parametrize("name", NAMES)
def test_the_two_graphs_together_are_the_one(name: str) -> None:
    graph = trace_tiny(name)
    encoder, decoder = split_encoder(graph)
    module, inputs, dims = built(name)
    given = sample(inputs, dims, {"batch": 3, "sequence": 11, "target": 6}, 5)
    with torch.no_grad():
        decoder.encoder = encoder
        assert_close(decoder(input_ids=given["decoder_input_ids"], **encode(decoder, given)), module(**given), rel=1e-6)
    assert [s.name for s in encoder.inputs] == [s.name for s in graph.inputs[:1]]
    assert [s.name for s in decoder.inputs] == ["input_ids", *encoder.outputs]
    assert len(encoder.outputs) == 4, "keys and values of two cross-attentions"
    assert not {n for n in encoder.constants() if "decoder.block" in n and "EncDec" not in n}


def test_both_parts_round_and_leave_out_what_the_whole_does() -> None:
    graph, dense = trace_tiny("t5_whole"), trace_tiny("t5_whole")
    _, inputs, dims = built("t5_whole")
    batches = [sample(inputs, dims, {"batch": 4, "sequence": 11}, seed) for seed in range(4)]
    Pipeline([Sparsify(active=0.65), Quantize(bits=8)]).run(graph, Context(Calibration(batches, "sparse"), dense=dense))
    encoder, decoder = split_encoder(graph)
    decoder.encoder, given = encoder, batches[0]
    with torch.no_grad():
        whole = graph(**given)
        assert_close(decoder(input_ids=given["decoder_input_ids"], **encode(decoder, given)), whole, rel=1e-5)
    assert float((whole - dense(**given)).abs().max()) > 1e-3
    assert AddKVCache(context_length=16).run(graph, Context()).changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_writes_what_the_module_writes(name: str, backend: str, tmp_path: Path) -> None:
    graph, inputs, begin = cached(name), read(name), [0, 5, 7]
    session: Any = TorchDecoder(graph)
    if backend == "ort":
        lower(graph, tmp_path)
        session = decoder_for(OrtModel(tmp_path, threads=1))
        with pytest.raises(BackendError, match="encoder–decoder"):
            OrtSlots(session.model, slots=2, capacity=16)
    expected = written(name, inputs, begin)
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(2)]
    generator = Seq2SeqGenerator(session, Numbers(), begin)
    greedy = generator.generate(rows, Sampling(max_tokens=STEPS))
    assert [list(c.tokens) for c in greedy] == expected
    assert all(c.cached for c in greedy)
    alone = generator.generate(rows[1:], Sampling(max_tokens=STEPS))[0]
    assert list(alone.tokens) == expected[1]
    assert "".join(generator.stream(rows[0], Sampling(max_tokens=STEPS))) == greedy[0].text
    with pytest.raises(RequestError, match="encoder has read 1 inputs"):
        session.prefill(np.zeros((2, 3), np.int64), np.array([3, 3]), 4)


def test_sampling_and_tokens_that_are_never_chosen() -> None:
    inputs = {k: v[0] for k, v in read("t5_whole").items()}
    session = TorchDecoder(cached("t5_whole"))
    choice = Sampling(max_tokens=STEPS, temperature=1.5, seed=3)
    one, two = (Seq2SeqGenerator(session, Numbers(), [0]).generate([inputs], choice)[0].tokens for _ in range(2))
    assert one == two
    never = Seq2SeqGenerator(session, Numbers(), [0], never=one[1:], never_first=one[:1]).generate([inputs], choice)[0].tokens
    assert not set(never) & set(one[1:])
    assert never[0] != one[0]
    shorter = {"input_ids": inputs["input_ids"][:5]}
    both = Seq2SeqGenerator(session, Numbers(), [0]).generate([inputs, shorter], Sampling(max_tokens=4))
    assert both[1].tokens == Seq2SeqGenerator(session, Numbers(), [0]).generate([shorter], Sampling(max_tokens=4))[0].tokens


def test_sessions_say_what_is_missing() -> None:
    session = TorchDecoder(cached("whisper_whole"))
    with pytest.raises(RequestError, match="the encoder has read nothing"):
        session.prefill(np.zeros((1, 1), np.int64), np.ones(1, np.int64), 4)
    graph = trace_tiny("gpt2")
    AddKVCache(context_length=16).run(graph, Context())
    with pytest.raises(RequestError, match="no encoder"):
        TorchDecoder(graph).encode(input_ids=np.zeros((1, 4), np.int64))
    with pytest.raises(RequestError, match="at least one token"):
        Seq2SeqGenerator(session, Numbers(), [])


class Pair(nn.Module):
    """A decoder that reads a source in a way of ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(32, 16)

    def forward(self, source: Tensor, written: Tensor) -> Tensor:
        x, memory = (self.embed(ids).unflatten(-1, (2, 8)).transpose(1, 2) for ids in (written, source))
        attend = nn.functional.scaled_dot_product_attention
        own = attend(x, x, x, is_causal=True)
        if self.kind == "none":
            return own.transpose(1, 2).flatten(2) + written[..., None]
        if self.kind == "masked":  # padding of the source is hidden
            mask = (source > 3)[:, None, None, :].expand(-1, 1, written.shape[1], -1)
            return (own + attend(own, memory, memory, mask)).transpose(1, 2).flatten(2)
        distance = torch.arange(written.shape[1])[:, None] - torch.arange(source.shape[1])
        return (own + attend(own, memory, memory, distance * 0.1)).transpose(1, 2).flatten(2)


def pair(kind: str) -> Graph:
    torch.manual_seed(0)
    dims = {"source": {0: "batch", 1: "length"}, "written": {0: "batch", 1: "target"}}
    return trace(Pair(kind).eval(), {"source": tokens(2, 7, 32), "written": tokens(2, 5, 32)}, dims)


def test_a_mask_that_depends_on_the_source_is_kept() -> None:
    graph = pair("masked")
    assert token_input(graph) == 1
    result = AddKVCache(context_length=16).run(graph, Context())
    assert result.changed
    assert result.facts["relative_error"] < 1e-5
    assert [s.shape for s in graph.inputs if s.name == "encoded_0"] == [("batch", 2, "source", 8)]


@pytest.mark.parametrize(
    ("kind", "reason"), [("none", "reads nothing that depends on the other inputs"), ("distance", "what is added to its scores")]
)
def test_refusals(kind: str, reason: str) -> None:
    graph = pair(kind)
    result = AddKVCache(context_length=16).run(graph, Context())
    assert not result.changed
    assert graph.encoder is None
    assert reason in result.refused[0].reason
