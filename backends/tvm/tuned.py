"""What tuning found: a database in the user's cache folder, read whenever a graph is lowered."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from dyncomp.backends.tvm.machine import Machine
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dyncomp.cache import cache_folder
from dyncomp.errors import ModelError
from dyncomp.whole import replacing

SCHEMA = 1
_KERNELS = Path(__file__).parent / "kernels"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Parameters(_Strict):
    """Of a :class:`~dyncomp.backends.tvm.kernels.tile.Tile`."""

    vectors: PositiveInt
    rows: PositiveInt
    unroll: PositiveInt
    parts: PositiveInt
    split: PositiveInt


class Trial(_Strict):
    """A candidate that was tried.

    Args:
        ratio: seconds of the default over the candidate's, by number of tokens; median. noise: the same of the default over its own copy,
            as far from 1 as a median of so many rounds may be by chance.
        failed: why it was not timed: it does not build, or computes something else.
        taken: whether it won, twice.
    """

    parameters: Parameters
    ratio: dict[str, float] = {}
    noise: dict[str, float] = {}
    failed: str = ""
    taken: bool = False


class Entry(_Strict):
    """One kernel at one shape on one kind of processor.

    Args:
        sources: of the kernels; what other sources were measured to give says nothing about these.
        best: position in ``trials`` of the one to use; None: the default.
    """

    kernel: str
    shape: dict[str, int | str | bool]
    dtype: str = "float32"
    architecture: str
    vector: list[str]
    threads: PositiveInt
    sources: str
    trials: list[Trial] = []
    best: int | None = Field(default=None, ge=0)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.kernel, *sorted(self.shape.items()), self.dtype, self.architecture, *self.vector, self.threads, self.sources)

    @property
    def chosen(self) -> Trial | None:
        return None if self.best is None else self.trials[self.best]


class _Document(_Strict):
    schema_version: int
    entries: list[Entry]


class Database:
    """The file, read when it is first asked for something.

    Args:
        path: by default ``tvm-tuning.json`` in the cache folder; it need not exist.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "tvm-tuning.json"

    def entries(self) -> dict[tuple[Any, ...], Entry]:
        """Raises:
        ModelError: the file is damaged, or of another schema; names it.
        """
        again = "remove the file, or put it back, and run dyncomp tune again"
        try:
            document = json.loads(self.path.read_bytes())
            version = document.get("schema_version") if isinstance(document, dict) else None
            if isinstance(version, int) and version != SCHEMA:
                raise ModelError(f"the tuning database {self.path} has schema {version}; this dyncomp reads schema {SCHEMA}", hint=again)
            entries = _Document.model_validate(document).entries
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ModelError(f"the tuning database {self.path} cannot be read: {error.strerror}", hint="check its permissions") from error
        except (ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the tuning database {self.path} is damaged: {reason}", hint=again) from error
        for entry in entries:
            if entry.best is not None and not (entry.best < len(entry.trials) and entry.trials[entry.best].taken):
                raise ModelError(f"the tuning database {self.path} is damaged: {entry.kernel} chose what was not taken", hint=again)
        return {entry.key: entry for entry in entries}

    def of(self, machine: Machine) -> list[Entry]:
        """What was chosen for a machine, these kernels and its number of threads."""
        here = (machine.architecture, list(machine.vector), machine.threads, sources())
        found = [e for e in self.entries().values() if (e.architecture, e.vector, e.threads, e.sources) == here]
        return [e for e in found if e.chosen is not None]

    def digest(self, machine: Machine) -> str:
        """Of what lowering would take from here; empty for nothing."""
        chosen = sorted(f"{e.key} {e.chosen.parameters}" for e in self.of(machine) if e.chosen is not None)
        return hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:12] if chosen else ""

    def put(self, entry: Entry) -> None:
        """Keep an entry beside the others there are by now; the file is always whole."""
        entries = self.entries() | {entry.key: entry}
        with replacing(self.path) as part:
            part.write_text(_Document(schema_version=SCHEMA, entries=list(entries.values())).model_dump_json(indent=1) + "\n")


@functools.cache
def sources() -> str:
    """A digest of the kernels."""
    digest = hashlib.sha256()
    for name in ("functions", "linear", "routed_ffn", "tile"):
        digest.update((_KERNELS / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def tiles_for(machine: Machine, database: Database | None = None) -> Any:
    """The :class:`~dyncomp.backends.tvm.shapes.Tiles` of a machine, with what the database has for it.

    Raises:
        ModelError: the database is damaged, or holds parameters that a kernel cannot have.
    """
    import dataclasses

    from dyncomp.backends.tvm.kernels.tile import Tile
    from dyncomp.backends.tvm.shapes import SHAPES, Tiles

    database, default, tuned = database or Database(), Tile.of(machine), {}
    for entry in database.of(machine):
        assert entry.chosen is not None
        tile = dataclasses.replace(default, **entry.chosen.parameters.model_dump())
        try:
            shape: Any = SHAPES[entry.kernel](**entry.shape)
            allowed = shape.allows(tile)
        except (KeyError, TypeError):
            allowed = False
        if not allowed:
            raise ModelError(
                f"the tuning database {database.path} has {entry.chosen.parameters} for {entry.kernel} {entry.shape}, which the kernel "
                "cannot have",
                hint="remove the file and run dyncomp tune again",
            )
        tuned[shape] = tile
    return Tiles(default, tuned)
