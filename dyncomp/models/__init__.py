"""Where a dense model comes from: a directory, a file, a Python function, a package or a hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from dyncomp.errors import ModelError
from dyncomp.mapped import TensorStore
from dyncomp.models.checkpoint import weight_count
from dyncomp.models.factory import load_factory
from dyncomp.models.gguf import load_gguf, load_gguf_architecture
from dyncomp.models.huggingface import load_architecture, load_directory, load_hub, load_processor, load_tokenizer
from dyncomp.models.loaded import LoadedModel
from dyncomp.models.packaged import PACKAGED, load_packaged, packaged_path
from dyncomp.models.program import load_program

__all__ = [
    "PACKAGED", "LoadedModel",
    "count_weights", "load_architecture", "load_for_inspection", "load_model", "load_processor", "load_tokenizer",
]  # fmt: skip

_ACCEPTED = (
    "a model is a Hugging Face directory, a .gguf file, a .pt2 file, a Python factory (module:function), a hub id (owner/name), "
    f"or one of the packaged {', '.join(PACKAGED)}"
)


def load_model(source: str, *, dtype: torch.dtype = torch.float32, store: TensorStore | None = None) -> LoadedModel:
    """Load a dense model, wherever it comes from.

    Args:
        source: a path that exists is taken as one; then a factory ``module:function``, a packaged name, a hub id.
        dtype: of the parameters. A ``.pt2`` program keeps its own.
        store: where to put the weights; a directory's are read and converted one by one, other sources are in memory once before.

    Raises:
        ModelError: the source is missing, damaged, truncated, or of an unknown kind or architecture.
        MissingExtraError: an optional package is needed; the message has the pip command.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return load_directory(path, name=source, dtype=dtype, store=store)
    loaded = _load_other(path, source, dtype)
    if store is not None:
        store.adopt(loaded.module)
    return loaded


def count_weights(source: str) -> int:
    """How many weights a model has, as far as its files say without being read: 0 for what is no directory."""
    path = Path(source).expanduser()
    return weight_count(path) if path.is_dir() else 0


def _load_other(path: Path, source: str, dtype: torch.dtype) -> LoadedModel:
    if path.suffix in (".gguf", ".pt2") and not path.is_file():
        raise ModelError(f"no such file: {path}", hint=_ACCEPTED)
    if path.is_file():
        return _load_file(path, source, dtype)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source):
        return load_factory(source, dtype=dtype)
    if source in PACKAGED:
        return load_packaged(source, dtype=dtype)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source):
        return load_hub(source, dtype=dtype)
    raise ModelError(f"no model {source!r}: no such file or directory, and no packaged model of that name", hint=_ACCEPTED)


def load_for_inspection(source: str) -> LoadedModel:
    """What is needed to trace a model and look at it: on the meta device, without its weights, where the source allows.

    Takes everything :func:`load_model` takes, and a bare ``config.json``.
    """
    source = os.fspath(source)
    if source in PACKAGED and PACKAGED[source].whole and not Path(source).exists():
        return load_packaged(source)
    path = packaged_path(source) if source in PACKAGED and not Path(source).exists() else Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.name == "config.json"):
        return load_architecture(path, name=source)
    if path.is_file() and path.suffix == ".gguf":
        return load_gguf_architecture(path, name=source)
    return load_model(source)


def _load_file(path: Path, source: str, dtype: torch.dtype) -> LoadedModel:
    if path.suffix == ".gguf":
        return load_gguf(path, name=source, dtype=dtype)
    if path.suffix == ".pt2":
        return load_program(path, name=source)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise ModelError(f"{path} is a pickle, which can run any code when it is read; dyncomp never loads one", hint=_ACCEPTED)
    if path.name == "config.json" or path.suffix == ".safetensors":
        raise ModelError(f"{path} is one file of a Hugging Face directory", hint=f"give the directory: {path.resolve().parent}")
    raise ModelError(f"{path} is a file of an unknown kind ({path.suffix or 'no suffix'})", hint=_ACCEPTED)
