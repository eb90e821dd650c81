"""Checkpoints of healing: what an interrupted run needs to end with the bits of an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dyncomp.whole import replacing


@dataclass
class Progressed:
    """Where a run is.

    Args:
        steps: of the whole run; ``done``: of them.
        curve: (step, loss on the held-out windows) so far.
    """

    steps: int
    done: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The step with the lowest loss."""
        return min(self.curve, key=lambda point: point[1])[0]

    @property
    def looks_since_best(self) -> int:
        return sum(1 for step, _ in self.curve if step > self.best)


def save(folder: Path, key: str, progressed: Progressed, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; the one before stays valid until this one is complete."""
    name = f"step-{progressed.done}.safetensors"
    with replacing(folder / name) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    with replacing(folder / "state.json") as part:
        part.write_text(json.dumps({"key": key, "tensors": name, **asdict(progressed)}))
    for old in folder.glob("step-*"):
        if old.name != name:
            old.unlink()


def load(folder: Path, key: str) -> tuple[Progressed, dict[str, Tensor]] | None:
    """What :func:`save` wrote under this key, or None."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        document = json.loads((folder / "state.json").read_text())
        if document.pop("key") == key:
            tensors = load_file(folder / document.pop("tensors"))
            document["curve"] = [(int(step), float(loss)) for step, loss in document["curve"]]
            return Progressed(**document), tensors
    return None
