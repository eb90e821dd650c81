"""Is a Hugging Face directory whole? Read from the files' headers, before any weight is."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from dyncomp.errors import ModelError

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_config(folder: Path) -> dict[str, Any]:
    """The directory's ``config.json``.

    Raises:
        ModelError: it is absent, is not JSON, or names no model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "dyncomp.json").is_file():
            raise ModelError(
                f"{folder} is a bundle that dyncomp wrote, not a dense model", hint="give it to `dyncomp run`, `inspect` or `evaluate`"
            )
        raise ModelError(
            f"the directory {folder} has no config.json, so it is not a Hugging Face model",
            hint="point at the directory that save_pretrained wrote (config.json, *.safetensors, tokenizer files)",
        )
    config = _read_json(path)
    if "model_type" not in config:
        raise ModelError(
            f"{path} names no model_type, so nothing says how to build the model", hint="take config.json from the model's author"
        )
    return config


def check_weights(folder: Path) -> list[Path]:
    """The directory's safetensors files, each checked to be as long as its header says.

    Raises:
        ModelError: there are none (or only pickles), a shard is missing, or a file is damaged or truncated.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} has no weight_map, so nothing says which shard holds which tensor", hint="copy the file again")
        paths = [folder / name for name in sorted(set(map(str, shards.values())))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(paths)} shards its index names: {', '.join(missing[:4])}",
                hint="copy the missing files",
            )
    else:
        paths = [folder / "model.safetensors"]
        if not paths[0].is_file():
            raise _no_weights(folder)
    for path in paths:
        check_safetensors(path)
    return paths


def weight_count(folder: Path) -> int:
    """How many values the directory's safetensors files hold, by their headers.

    Raises:
        ModelError: as :func:`read_config` and :func:`check_weights`.
    """
    read_config(folder)
    return sum(math.prod(entry["shape"]) for path in check_weights(folder) for entry in check_safetensors(path).values())


def check_safetensors(path: Path) -> dict[str, Any]:
    """Compare a safetensors file's length with what its header says; returns the header's entries by tensor.

    Raises:
        ModelError: the file is truncated or damaged; the message names it and gives both lengths.
    """
    size = path.stat().st_size
    again = "download or copy the file again"
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ModelError(f"{path} is truncated: it has {size} bytes, a safetensors file starts with a length of 8", hint=again)
        (length,) = struct.unpack("<Q", start)
        if length > 100_000_000:  # the limit of the format
            raise ModelError(f"{path} is damaged or is no safetensors file: its header would be {length} bytes long", hint=again)
        if 8 + length > size:
            raise ModelError(f"{path} is truncated: its header alone says {8 + length} bytes, the file has {size}", hint=again)
        header = file.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: its header is not the JSON of a safetensors file", hint=again) from error
    if end > size:
        raise ModelError(f"{path} is truncated: its header says {end} bytes, the file has {size}", hint=again)
    if end < size:
        raise ModelError(f"{path} is damaged: its header says {end} bytes, the file has {size}", hint=again)
    return tensors


def _no_weights(folder: Path) -> ModelError:
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        return ModelError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles[:3])}), which can run any code when read; dyncomp never loads one",
            hint="where you trust it: AutoModel.from_pretrained(DIR).save_pretrained(NEW) writes safetensors",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return ModelError(
            f"{folder} has {', '.join(others[:3])}, but neither model.safetensors nor model.safetensors.index.json",
            hint="rename the file to model.safetensors, or copy the index",
        )
    return ModelError(f"{folder} has no weights: no model.safetensors and no model.safetensors.index.json", hint="copy the weights too")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object", hint="copy the file again")
    return value
