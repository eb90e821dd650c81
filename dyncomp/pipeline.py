"""Passes and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options, so ``carve-experts{experts=16 shared=2}`` is its spec on the
command line, in a recipe and in a bundle's manifest at once.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncomp.errors import DyncompError, PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.regions.refusal import Refusal
from dyncomp.rows import Rows
from dyncomp.sweep import release_memory

if typing.TYPE_CHECKING:
    from dyncomp.calibrate import Calibration

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``; called often, must be cheap."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class Context:
    """What passes may use besides the graph.

    Args:
        calibration: windows or images and the statistics of the dense model on them.
        probe: inputs by name on which each pass is checked against the graph before it.
        progress: called as work proceeds.
        seed: for everything random.
        dense: the graph before any pass, for passes that follow it.
        text: windows of tokens, images or recordings to train on, for passes with ``reads_text``.
        folder: where such a pass keeps checkpoints, so that it continues after an interruption; None keeps none.
        running: the pass at work, for messages.
    """

    calibration: Calibration | None = None
    probe: dict[str, Tensor] | None = None
    progress: Progress = no_progress
    seed: int = 0
    dense: Graph | None = None
    text: Rows | None = None
    folder: Path | None = None
    running: Pass | None = None

    def need_calibration(self, who: str) -> Calibration:
        if self.calibration is None:
            raise RequestError(f"{who} needs calibration statistics", hint="give a text to calibrate on (--calibrate FILE)")
        return self.calibration


@dataclass
class PassResult:
    """What a pass did: names of the regions it changed, what it refused, and figures worth keeping."""

    changed: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses set ``name`` and implement :meth:`run`; they mutate the graph they are given, never its
    tensors (``graph.add_tensor`` replaces one)."""

    name: ClassVar[str] = ""
    tolerance: ClassVar[float | None] = None
    """Largest relative error of the outputs against the graph before; None when the pass changes the function by design."""

    reads_statistics: ClassVar[bool] = False
    """Whether it wants ``ctx.calibration.statistics``; its batches are there in any case."""

    reads_text: ClassVar[bool] = False
    """Whether it trains on ``ctx.text``."""

    together: ClassVar[Callable[[Sequence[Any], Graph, Context], list[PassResult]] | None] = None
    """Runs several passes at once. Neighbours in a pipeline that name the same function are handed to it together."""

    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Pass.registry[cls.name] = cls

    def precheck(self, graph: Graph) -> None:
        """Raise RequestError for what can be known to be wrong before any work is done on the dense ``graph``."""

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        raise NotImplementedError

    def sketch(self, kind: str) -> Pass | None:
        """The cheapest pass that makes of a layer what this one makes of it, as far as its speed goes; None where it leaves it alone.

        Args:
            kind: ``"ffn"`` or ``"linear"``.

        Raises:
            PassError: nobody has said what it is.
        """
        raise PassError(f"{self.name} cannot be looked up in the table of latencies", hint="implement sketch")

    @property
    def spec(self) -> str:
        """``name{option=value …}`` with the options that differ from their defaults."""
        options = [
            f"{f.name.replace('_', '-')}={_format_option(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + ("{" + " ".join(options) + "}" if options else "")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite when ``actual`` is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual - expected).abs().max() / scale)


def _on_probe(graph: Graph, ctx: Context) -> Tensor | None:
    """The graph's output on the probe inputs, where they fit."""
    if ctx.probe is None or {i.name for i in graph.inputs} != ctx.probe.keys():
        return None
    with torch.no_grad():
        output: Tensor = graph(**ctx.probe)
    return output


@dataclass
class PassRecord:
    """One run of one pass, for reports and manifests."""

    spec: str
    seconds: float
    relative_error: float | None
    result: PassResult


@dataclass
class Pipeline:
    """Runs passes in order; after each one the graph is linted and its numerics checked.

    Args:
        passes: what to run.
        dump: a folder for the graph's text after each pass.
    """

    passes: Sequence[Pass]
    dump: Path | None = None

    def run(self, graph: Graph, ctx: Context, *, on_done: Callable[[list[PassRecord]], None] | None = None) -> list[PassRecord]:
        """Apply the passes to ``graph`` in place.

        Args:
            on_done: called after each pass (or group of passes that ran together), when ``graph`` is whole again.

        Raises:
            PassError: a pass failed, left a malformed graph or exceeded its tolerance; names it and those before it.
        """
        records: list[PassRecord] = []
        groups = self._groups()
        expected = _on_probe(graph, ctx) if groups else None  # not a copy of the graph: that would keep the weights a pass replaces
        for group in groups:
            start, index, inputs = time.perf_counter(), len(records), graph.inputs
            ctx.running = last = group[-1]
            try:
                results = [last.run(graph, ctx)] if len(group) == 1 else type(last).together(group, graph, ctx)  # type: ignore[misc]
                graph.clean()
                found = _on_probe(graph, ctx) if graph.inputs == inputs else None
                error = relative_error(found, expected) if found is not None and expected is not None else None
            except RequestError:
                raise
            except Exception as failure:
                what = failure.what if isinstance(failure, DyncompError) else f"{type(failure).__name__}: {failure}"
                raise PassError(self._describe(group, ctx.running, what), hint=getattr(failure, "hint", None)) from failure
            allowed = last.tolerance if last.tolerance is not None else sys.float_info.max
            if error is not None and not error <= allowed:
                raise PassError(self._describe(group, last, f"the outputs differ by {error:.2e} (relative); allowed {last.tolerance}"))
            seconds = (time.perf_counter() - start) / len(group)
            done = [PassRecord(p.spec, seconds, error if p is last else None, r) for p, r in zip(group, results, strict=True)]
            records += done
            expected = found if found is not None else _on_probe(graph, ctx)
            if self.dump is not None:
                self.dump.mkdir(parents=True, exist_ok=True)
                (self.dump / f"{index:02d}-{'+'.join(p.name for p in group)}.txt").write_text(graph.text())
            if on_done is not None:
                on_done(done)
            release_memory()
        return records

    def _groups(self) -> list[list[Pass]]:
        groups: list[list[Pass]] = []
        for item in self.passes:
            if groups and type(item).together is not None and type(item).together is type(groups[-1][-1]).together:
                groups[-1].append(item)
            else:
                groups.append([item])
        return groups

    def _describe(self, group: list[Pass], failed: Pass | None, what: str) -> str:
        failed = failed or group[-1]
        earlier = ", ".join(p.spec for p in self.passes[: next(i for i, p in enumerate(self.passes) if p is failed)])
        return f"the pass {failed.spec!r} failed{f' (after {earlier})' if earlier else ''}: {what}"


# ---- specs ---------------------------------------------------------------------------------------------------------
_SPEC = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*(?:,|;|$)")


def parse_passes(spec: str) -> list[Pass]:
    """Parse ``carve-experts{experts=16 shared=2}, fit-router`` into passes.

    Raises:
        RequestError: an unknown pass or option, or a value of the wrong type or out of range.
    """
    passes, position = [], 0
    while position < len(spec.rstrip(" ,;")):
        match = _SPEC.match(spec, position)
        if match is None or match.end() == position:
            raise RequestError(
                f"cannot read the pass list at {spec[position : position + 30]!r}",
                hint="write it as: carve-experts{experts=16}, fit-router",
            )
        passes.append(make_pass(match.group(1), match.group(2) or ""))
        position = match.end()
    return passes


def make_pass(name: str, options: str = "") -> Pass:
    """Make one pass from its name and the text between the braces."""
    if name not in Pass.registry:
        raise RequestError(f"there is no pass {name!r}", hint="passes: " + ", ".join(sorted(Pass.registry)))
    kind = Pass.registry[name]
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for item in options.split():
        key, separator, text = item.partition("=")
        option = key.replace("-", "_")
        if option not in fields or not separator:
            known = ", ".join(sorted(f.replace("_", "-") for f in fields)) or "none"
            raise RequestError(
                f"the pass {name!r} has no option {key!r}" if separator else f"{item!r} is not option=value", hint=f"options: {known}"
            )
        values[option] = _parse_option(text, hints[option], f"{name}{{{key}}}")
    return kind(**values)


def _parse_option(text: str, kind: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # ``X | None``: None is what an option that is not given means
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(_parse_option(part, item, where) for part in text.split("+") if part)
    except (ValueError, KeyError):
        raise RequestError(f"{where}: {text!r} is not a {getattr(kind, '__name__', kind)}") from None
    return text


def _format_option(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
