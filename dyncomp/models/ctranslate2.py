"""Whisper as CTranslate2 stores it: the binary file is read, nothing is run.

The format (``model.bin``, version 6): a header, then tensors, each with its name, shape, type and bytes, then names that stand for
others; little-endian. CTranslate2 lays the projections of queries, keys and values one below the other.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyncomp.errors import ModelError
from dyncomp.models.extras import quiet, require
from dyncomp.models.loaded import Decoding, LoadedModel
from dyncomp.models.wrap import wrap

_VERSION, _SPEC = 6, "WhisperSpec"
_DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
MODEL, _TOKENIZER = "model.bin", "tokenizer.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name, in the type it is stored in; aliases too.

    Raises:
        ModelError: the file is missing, truncated, or of another version or kind of model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    file = _Reader(data, path)
    version = file.number("I")
    if version != _VERSION:
        raise ModelError(f"{path} is of version {version} of CTranslate2's format; this reads version {_VERSION}")
    if (spec := file.text()) != _SPEC:
        raise ModelError(f"{path} holds a {spec}; of CTranslate2's models dyncomp reads {_SPEC}")
    file.number("I")  # the specification's revision
    found: dict[str, Tensor] = {}
    for _ in range(file.number("I")):
        name = file.text()
        shape = [file.number("I") for _ in range(file.number("B"))]
        kind, size = file.number("B"), file.number("I")
        if kind not in _DTYPES:
            raise ModelError(f"{path}: the tensor {name!r} is of the unknown type {kind}")
        if size != int(np.prod(shape, dtype=np.int64)) * _DTYPES[kind].itemsize:
            raise ModelError(f"{path}: the tensor {name!r} has {size} bytes, which its shape {shape} does not")
        found[name] = torch.from_numpy(np.frombuffer(file.take(size), _DTYPES[kind]).reshape(shape).copy())
    for _ in range(file.number("I")):
        alias, name = file.text(), file.text()
        found[alias] = found[name]
    return found


class _Reader:
    def __init__(self, data: bytes, path: Path) -> None:
        self._data, self._at, self._path = data, 0, path

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise ModelError(f"{self._path} is truncated at {len(self._data)} bytes", hint="install the package that ships it again")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0])

    def text(self) -> str:
        return self.take(self.number("H")).removesuffix(b"\0").decode()


def load_whisper(folder: Path, *, name: str, dtype: torch.dtype = torch.float32, kind: str = "ctranslate2") -> LoadedModel:
    """``model.bin``, ``config.json`` and ``tokenizer.json`` as a ``WhisperForConditionalGeneration``.

    Transcripts are without time stamps.

    Raises:
        ModelError: a file is missing or damaged.
        MissingExtraError: transformers is not installed.
    """
    require("transformers", needed_for="loading a Whisper model")
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    tensors = read_tensors(folder / MODEL)
    try:
        settings = json.loads((folder / "config.json").read_text())
        with quiet():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / _TOKENIZER))
        end, *begin = _special(tokenizer, "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        config = WhisperConfig(
            **_sizes(tensors), architectures=["WhisperForConditionalGeneration"], use_cache=False, pad_token_id=end, bos_token_id=end,
            eos_token_id=end, decoder_start_token_id=begin[0], suppress_tokens=settings["suppress_ids"],
            begin_suppress_tokens=settings["suppress_ids_begin"],
        )  # fmt: skip
        state = _state(tensors, int(config.encoder_layers), int(config.decoder_layers))
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no Whisper model that can be read: {error}", hint="install the package that ships it again"
        ) from error
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    model.tie_weights()
    decoding = Decoding(tuple(begin), tuple(settings["suppress_ids"]), tuple(settings["suppress_ids_begin"]))
    seconds = config.max_source_positions // 50  # a position is two frames of 10 ms; everything else is the same in every Whisper
    processor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    return wrap(model, name=name, kind=kind, tokenizer=tokenizer, causal=False, processor=processor, decoding=decoding)


def _special(tokenizer: Any, *tokens: str) -> list[int]:
    known = tokenizer.get_vocab()
    return [int(known[token]) for token in tokens]


def _sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers = {part: len({n.split("/")[1] for n in tensors if n.startswith(f"{part}/layer_") and "layer_norm" not in n.split("/")[1]})
              for part in ("encoder", "decoder")}  # fmt: skip
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    sizes = {"vocab_size": int(vocabulary), "d_model": int(width), "num_mel_bins": int(tensors["encoder/conv1/weight"].shape[1]),
             "max_source_positions": len(tensors["encoder/position_encodings/encodings"]),
             "max_target_positions": len(tensors["decoder/position_encodings/encodings"])}  # fmt: skip
    for part, count in layers.items():
        sizes |= {f"{part}_layers": count, f"{part}_attention_heads": int(tensors[f"{part}/num_heads"]),
                  f"{part}_ffn_dim": len(tensors[f"{part}/layer_0/ffn/linear_0/bias"])}  # fmt: skip
    return sizes


def _state(tensors: dict[str, Tensor], encoder_layers: int, decoder_layers: int) -> dict[str, Tensor]:
    """The tensors under the names of ``WhisperForConditionalGeneration``."""
    found: dict[str, Tensor] = {"proj_out.weight": tensors["decoder/projection/weight"]}

    def put(target: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        found[f"model.{target}.weight"], found[f"model.{target}.bias"] = tensors[f"{source}/{weight}"], tensors[f"{source}/{bias}"]

    def norm(target: str, source: str) -> None:
        put(target, source, "gamma", "beta")

    def attention(target: str, source: str, first: str, others: list[str]) -> None:
        """``linear_0 …``: the projections of ``first``, one below the other, then those of ``others``, then the output's."""
        for number, names in enumerate([first, *others, "out"]):
            parts = names.split()
            weights, biases = (tensors[f"{source}/linear_{number}/{kind}"].chunk(len(parts)) for kind in ("weight", "bias"))
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                found[f"model.{target}.{part}_proj.weight"] = weight.contiguous()
                if part != "k":  # a bias of the keys changes no weight of the attention: Whisper has none, and the file zeros
                    found[f"model.{target}.{part}_proj.bias"] = bias.contiguous()
        norm(f"{target}_layer_norm", f"{source}/layer_norm")

    for part, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        for i in range(layers):
            target, source = f"{part}.layers.{i}", f"{part}/layer_{i}"
            attention(f"{target}.self_attn", f"{source}/self_attention", "q k v", [])
            if part == "decoder":
                attention(f"{target}.encoder_attn", f"{source}/attention", "q", ["k v"])
            put(f"{target}.fc1", f"{source}/ffn/linear_0")
            put(f"{target}.fc2", f"{source}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        norm(f"{part}.layer_norm", f"{part}/layer_norm")
        found[f"model.{part}.embed_positions.weight"] = tensors[f"{part}/position_encodings/encodings"]
    put("encoder.conv1", "encoder/conv1")
    put("encoder.conv2", "encoder/conv2")
    found["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    return found
