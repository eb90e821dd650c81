"""Tune a bundle: parameters for the TVM kernels that its model calls, found by timing, and its artifact made again with what won."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyncomp.bundle import MANIFEST, Bundle, disk_errors, open_bundle, seal
from dyncomp.deploy import check_parity, with_cache
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.hardware import default_threads
from dyncomp.pipeline import Progress, no_progress

PROMPT = 128
"""Tokens of the prompts that kernels are tuned for, beside the single token of a decoding step."""


@dataclass(frozen=True)
class TuneRequest:
    """What to tune and how.

    Args:
        bundle: with an artifact for TVM.
        minutes: time for the search, building and timing; lowering comes on top of it.
        threads: that the kernels are tuned for; None is every core.
        seed: of the order of the candidates.
        again: forget what was measured before for these shapes.
    """

    bundle: Path
    minutes: float = 10.0
    threads: int | None = None
    seed: int = 0
    again: bool = False

    def validate(self) -> None:
        """Raises:
        RequestError: an option is out of range.
        """
        if self.minutes < 0:
            raise RequestError(f"--minutes {self.minutes:g} is not a time", hint="0 measures nothing and uses what is known")
        if self.threads is not None and not 1 <= self.threads <= default_threads():
            raise RequestError(
                f"--threads {self.threads}: this process may use {default_threads()}", hint="kernels are tuned on the machine they run on"
            )


def tune(request: TuneRequest, *, progress: Progress = no_progress, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Search, then make the bundle's TVM artifact again if what is known now differs from what it was made with.

    Returns:
        ``kernels``: a row for each kernel and shape; ``artifact``: ``made again`` or ``as it was``; ``parity`` of a new one.

    Raises:
        RequestError: an option is wrong. BundleError: there is no bundle with a TVM artifact. ModelError: the tuning database is damaged.
        PassError: the new artifact does not give what its graph gives; the bundle is as it was.
    """
    from dyncomp.backends.tvm.machine import this_machine
    from dyncomp.backends.tvm.require import require_compiler
    from dyncomp.backends.tvm.tuned import Database, tiles_for

    request.validate()
    started = time.perf_counter()
    opened = open_bundle(request.bundle)
    artifact = opened.artifact("tvm")
    require_compiler()
    from dyncomp.backends.artifact import CONFIG
    from dyncomp.backends.tvm.lower import lower
    from dyncomp.backends.tvm.select import select
    from dyncomp.backends.tvm.tune import Stopwatch
    from dyncomp.backends.tvm.tune import tune as search

    machine, database = dataclasses.replace(this_machine(), threads=request.threads or default_threads()), Database()
    graph, _ = with_cache(opened.graph())
    tasks = tasks_of(select(graph, tiles_for(machine, database)))
    if say is not None:
        say(f"{request.bundle}: {sum(t.calls for t in tasks)} kernels with parameters, of {len(tasks)} shapes")
    entries = search(
        tasks, machine, database, measure=Stopwatch(machine), seconds=60 * request.minutes, seed=request.seed, again=request.again,
        progress=progress,
    )  # fmt: skip
    tiles = tiles_for(machine, database)
    report: dict[str, Any] = {
        "schema": 1,
        "bundle": str(request.bundle),
        "threads": machine.threads,
        "database": str(database.path),
        "kernels": [_row(*pair, machine) for pair in zip(tasks, entries, strict=True)],
        "artifact": "as it was",
    }
    if json.loads((artifact / CONFIG).read_text()).get("tuned", []) != tiles.used(select(graph, tiles)):

        def make(folder: Path) -> None:
            lower(graph, folder, machine=machine, tuning=database, progress=progress)
            report["parity"] = check_parity(graph, folder, threads=machine.threads, backend="tvm")

        report["artifact"] = "made again"
        _replace_artifact(opened, make, report)
    return report | {"seconds": time.perf_counter() - started}


def tasks_of(selected: Graph) -> list[Any]:
    """The shapes in a graph selected for TVM, with the numbers of tokens they meet: in a decoder one and a prompt's, else a prompt's."""
    from dyncomp.backends.tvm.shapes import called, tokens_of
    from dyncomp.backends.tvm.tune import Task

    sizes = [{"sequence": PROMPT}] if "kv_cache" not in selected.info else [{"sequence": 1}, {"sequence": PROMPT}]
    tokens = tokens_of(selected, *sizes)
    return [Task(shape, tokens[shape], calls) for shape, calls in called(selected).items()]


def _row(task: Any, entry: Any, machine: Any) -> dict[str, Any]:
    from dyncomp.backends.tvm.kernels.tile import Tile
    from dyncomp.backends.tvm.shapes import describe
    from dyncomp.backends.tvm.tune import candidates

    chosen = entry.chosen
    offered = candidates(task.shape, Tile.of(machine), machine, machine.threads)
    return {
        "kernel": entry.kernel,
        "shape": describe(task.shape),
        "calls": task.calls,
        "tokens": list(task.tokens),
        "candidates": len(offered),
        "tried": len(entry.trials),
        "failed": sum(bool(t.failed) for t in entry.trials),
        "parameters": None if chosen is None else chosen.parameters.model_dump(),
        "ratio": {} if chosen is None else chosen.ratio,
        "noise": {} if chosen is None else chosen.noise,
    }


def _replace_artifact(opened: Bundle, make: Callable[[Path], None], report: dict[str, Any]) -> None:
    """The bundle again, its TVM artifact made by ``make``; files that stay are linked. It is replaced when the new one is complete."""
    out = opened.path.absolute()
    folder = out.with_name(f"{out.name}.tuned.part")
    with disk_errors(out):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            shutil.copytree(out, folder, copy_function=_link, ignore=shutil.ignore_patterns("tvm", "report.json", MANIFEST))
            make(folder / "artifacts" / "tvm")
            evidence = opened.report()
            evidence["tuning"] = {key: report[key] for key in ("threads", "kernels", "parity")}
            if "bench" in evidence:  # of the artifact that was
                evidence["tuning"]["bench_before"] = evidence.pop("bench")
            (folder / "report.json").write_text(json.dumps(evidence, indent=1) + "\n")
            seal(folder, out, opened.manifest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
