"""What the backends that write artifacts share: what ``config.json`` says, reading it back, and checking inputs against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dyncomp.errors import ModelError, RequestError

if TYPE_CHECKING:  # opening and running a model must not take the seconds in which PyTorch is imported
    from torch import Tensor

    from dyncomp.graph import Graph

Array = np.ndarray[Any, Any]
CONFIG = "config.json"
ENCODER = "encoder"
"""The folder of an encoder's model, in that of its decoder's."""


def describe(graph: Graph, schema: int) -> dict[str, Any]:
    """What the configuration beside every lowered model says first."""
    return {
        "schema": schema,
        "name": graph.info.get("name", "model"),
        "task": graph.info.get("task"),
        "context_length": graph.info.get("context_length"),
        "kv_cache": graph.info.get("kv_cache"),
        "inputs": [{"name": s.name, "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape)} for s in graph.inputs],
        "outputs": list(graph.outputs),
        **({"encoder": ENCODER} if graph.encoder is not None else {}),
        "precision": graph.precision,
    }


def read_config(directory: Path, schema: int, *, again: str, older: str) -> dict[str, Any]:
    """The configuration beside a lowered model.

    Args:
        schema: the one this dyncomp writes.
        again: what to do when the file is missing or damaged; ``older``: when it was written by an earlier dyncomp.

    Raises:
        ModelError: it is missing, damaged, or of another schema.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
        if config["schema"] != schema:
            hint = "update dyncomp" if config["schema"] > schema else older
            raise ModelError(f"{directory / CONFIG} has schema {config['schema']}; this dyncomp reads schema {schema}", hint=hint)
        return dict(config)
    except FileNotFoundError as error:
        raise ModelError(f"{directory} holds no lowered model ({CONFIG} is missing)", hint=again) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory / CONFIG} is damaged: {first_line(error)}", hint=again) from error


def as_array(value: Array | Tensor, spec: dict[str, Any]) -> Array:
    """A contiguous array of the dtype that ``spec``, an input in ``config.json``, asks for.

    Raises:
        RequestError: it has the wrong rank, or a dtype of another kind.
    """
    array = np.asarray(value) if isinstance(value, np.ndarray) or not hasattr(value, "detach") else value.detach().cpu().numpy()
    if array.ndim != len(spec["shape"]):
        raise RequestError(f"the input {spec['name']!r} has shape {list(array.shape)}, it should be {spec['shape']}")
    dtype = np.dtype(spec["dtype"])
    if array.dtype != dtype:
        if array.dtype.kind != dtype.kind:
            raise RequestError(f"the input {spec['name']!r} is {array.dtype}, it should be {dtype}")
        array = array.astype(dtype)
    return np.ascontiguousarray(array)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
