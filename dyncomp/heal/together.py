"""One training in all the processes that ``torchrun`` started: the first does everything else, the others train with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.heal import ranks
from dyncomp.heal.loop import Trainer
from dyncomp.heal.settings import Settings
from dyncomp.rows import Rows, SpeechRows, tensors_of
from dyncomp.serialize import load_graph, save_graph


@contextlib.contextmanager
def leading() -> Iterator[bool]:
    """Join the processes that ``torchrun`` started. In the first (or only) one the block is what there is to do (True); in the others it
    comes when that is done (False). After an error in the first, ``torchrun`` ends the others."""
    with ranks.joined():
        if ranks.rank() > 0:
            while (training := _broadcast(None)) is not None:
                _follow(training)
            yield False
            return
        yield True
        if ranks.world() > 1:
            _broadcast({})


def share(graph: Graph, dense: Graph, windows: Rows, held_out: Rows, settings: Settings, seed: int, folder: Path | None) -> None:
    """Let the other processes make the same :class:`~dyncomp.heal.Trainer` and run it; nothing when there are none.

    Args:
        folder: of the checkpoints. All processes must see it, also on other machines: the models and the text are handed over there.
    """
    if ranks.world() == 1:
        return
    if folder is None:
        raise RequestError("healing in several processes needs a folder that all of them see")
    place = folder.absolute() / "shared"
    place.mkdir(parents=True, exist_ok=True)
    for name, value in (("graph", graph), ("dense", dense)):
        save_graph(value, place / f"{name}.json", place / f"{name}.safetensors")
    texts = {"windows": windows, "held out": held_out}
    save_file({f"{name} {i}": t.contiguous() for name, r in texts.items() for i, t in enumerate(tensors_of(r))}, place / "text.safetensors")
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    _broadcast({"folder": str(folder.absolute()), "settings": chosen, "seed": seed})


def _follow(training: dict[str, Any]) -> None:
    folder = Path(training["folder"])
    place = folder / "shared"
    graph, dense = (load_graph(place / f"{name}.json", place / f"{name}.safetensors") for name in ("graph", "dense"))
    found = load_file(place / "text.safetensors")
    windows, held_out = (_rows(found, name) for name in ("windows", "held out"))
    Trainer(graph, dense, windows, held_out, Settings(**training["settings"]), seed=training["seed"], folder=folder).run()


def _rows(found: dict[str, Tensor], name: str) -> Rows:
    first = found[f"{name} 0"]
    return SpeechRows(first, found[f"{name} 1"]) if f"{name} 1" in found else first


def _broadcast(document: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first process's document, as JSON; None for an empty one, with which it says that it is done."""
    data = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    if ranks.rank() > 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist())) or None
