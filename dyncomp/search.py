"""Finding the cheapest recipe within a loss limit, by measured loss and measured speed.

Candidates are tried from the least to the most work: plain quantization first, then routing on top of the best precision.
The loss is measured on calibration windows that no pass is fitted to, the speed on the lowered artifact beside the dense one in
the same process. What needs minutes to fit must promise something first: its speed by the table of latencies
(:mod:`dyncomp.latency`), its loss when fitted to little text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncomp.backends.native import available
from dyncomp.backends.native.sparse import gather_below
from dyncomp.calibrate import Calibration, calibrate, fingerprint
from dyncomp.errors import DyncompError, RequestError, SearchError
from dyncomp.evaluate import evaluate
from dyncomp.graph import Graph
from dyncomp.latency import LatencyTable, Layer, layers_of
from dyncomp.models.loaded import WRITES
from dyncomp.passes import Quantize, Sparsify
from dyncomp.passes.quantize import PRECISIONS, quantization_of, quantize_of
from dyncomp.pipeline import Context, Pass, PassRecord, Pipeline, parse_passes
from dyncomp.recipe import most_experts
from dyncomp.regions import find_regions
from dyncomp.rows import Rows, SpeechRows, is_pairs, written_lengths
from dyncomp.sweep import release_memory
from dyncomp.workspace import Workspace

SELECTION = 8
"""Calibration windows, images, or recordings, that the candidates' loss is measured on; nothing is fitted to them."""
LOOKS = ((1_024, 9.0), (4_096, 3.0))
"""Quick looks: calibration tokens that a candidate is fitted to, and the multiple of the loss limit from which it is given up. More text
has won back less: 90 % of 48 experts of SmolLM2 lose 4.0 % fitted to 4096 tokens, 2.9 % to 8192."""
CLOSE = 0.95
"""A candidate is fitted when the table of latencies gives it this much of the speed that is wanted: it is right to about 5 %."""
FIRST, HOPELESS = 2, 3.0
"""Windows that show that a candidate is hopeless: where they lose this many times what is allowed, the others are not run."""
MIXED = 0.7
"""Of the limit that a mix of precisions is chosen by."""
FILLED = 0.995
"""Of ``max_memory``, for a mix of precisions: tensors in a file begin at multiples of some bytes."""
EXPERTS = 48
ACTIVE = (0.9, 0.75)
SCREEN = 12.0
"""The margin in nats of a screened head; 10 lost twice as much (SmolLM2)."""
SPARSE = (0.75, 0.65)
"""Fractions of inputs."""


@dataclass(frozen=True)
class Goal:
    """What to search for: the fastest within ``max_loss``, the best that is ``speedup`` times as fast as the dense model, or the best
    within ``max_memory``, which may also be asked for beside one of the others.

    Args:
        max_loss: relative rise of the perplexity (decoders), or 1 - cosine to the dense embeddings (encoders).
        speedup: of decoding (decoders) or of a forward pass (encoders) over the dense fp32 model.
        max_memory: bytes of the artifact's weights and tables; keys and values of past tokens come on top.
        minutes: no candidate begins later.
        trials: no more candidates than this.
    """

    max_loss: float | None = None
    speedup: float | None = None
    max_memory: int | None = None
    minutes: float = 15.0
    trials: int | None = None

    def validate(self) -> None:
        """Raises:
        RequestError: a limit that nothing can meet, or nothing to do.
        """
        if self.max_loss is not None and self.speedup is not None:
            raise RequestError("--max-loss and --speedup are two goals", hint="give one: the other is what the search finds out")
        if self.max_loss is not None and not 0 <= self.max_loss < 10:
            raise RequestError(f"--max-loss {self.max_loss:.0%} is out of range", hint="for example 1%")
        if self.speedup is not None and not 0 < self.speedup < 1000:
            raise RequestError(f"--speedup {self.speedup:g} is out of range", hint="for example 1.5")
        if self.max_memory is not None and self.max_memory <= 0:
            raise RequestError(f"--max-memory {self.max_memory}: no model takes so little", hint="for example 100MB")
        if self.max_loss is None and self.speedup is None and self.max_memory is None:
            raise RequestError("a search needs a goal", hint="give max_loss, speedup or max_memory")
        if self.minutes <= 0 or (self.trials is not None and self.trials < 1):
            raise RequestError("a search needs time: --minutes must be positive and --trials at least 1")

    def meets(self, trial: Trial) -> bool:
        """Whether a trial reaches the goal; the speed is compared by the caller when the goal is a loss."""
        if not self.fits(trial.bytes):
            return False
        if self.speedup is not None:
            return trial.speed is not None and trial.speed >= self.speedup
        return not trial.quick and trial.loss is not None and (self.max_loss is None or trial.loss <= self.max_loss)

    def fits(self, size: int | None) -> bool:
        """Whether so many bytes, if that is known, are within ``max_memory``."""
        return self.max_memory is None or size is None or size <= self.max_memory

    def better(self, trial: Trial, than: Trial) -> bool:
        """Of two that meet the goal."""
        if self.max_loss is None:
            return trial.loss is not None and (than.loss is None or trial.loss < than.loss)
        return (trial.speed or 0) > (than.speed or 0)

    def __str__(self) -> str:
        limits = [] if self.speedup is None else [f"at least {self.speedup:g} x dense"]
        limits += [] if self.max_loss is None else [f"at most {self.max_loss:+.2%} loss"]
        return ", ".join([*limits, *([] if self.max_memory is None else [f"at most {self.max_memory / 1e6:.3g} MB"])])


@dataclass
class Trial:
    """One candidate and what was measured of it.

    Args:
        loss: as in :class:`Goal`; None where it was not measured, for the speed was too low, or there were too many bytes.
        quick: a quick look decided: the loss is that after fitting to little text, without quantization.
        predicted: speed by the table of latencies, times the dense fp32 model; None where nothing had to be fitted.
        speed: as measured; None where it was not, for the loss was too high.
        prefill: the same for a prompt of 512 tokens (decoders).
        token_seconds: of one token, where ``speed`` is measured.
        bytes: of the artifact's weights and tables; before it is made, what they should take.
    """

    name: str
    passes: list[str]
    loss: float | None
    seconds: float
    quick: bool = False
    predicted: float | None = None
    speed: float | None = None
    prefill: float | None = None
    token_seconds: float | None = None
    bytes: int | None = None


@dataclass
class Found:
    """The candidate that won: its graph, artifact (None without one), passes, and every trial on the way."""

    graph: Graph
    records: list[PassRecord]
    passes: list[Pass]
    artifact: Path
    trials: list[Trial]
    best: Trial


@dataclass
class Search:
    """The state of a search.

    Args:
        dense: the graph to convert.
        ctx: of the passes; its calibration batches are those that may be fitted to.
        selection: windows or images that nothing is fitted to.
        measure: artifact of a graph -> its speed relative to the dense model (see :func:`dyncomp.deploy.compare`).
        table: of latencies on this machine.
        constant: bytes of an artifact besides the weights.
        work: keeps finished trials.
    """

    dense: Graph
    ctx: Context
    selection: Rows
    task: str
    fingerprint: str
    goal: Goal
    work: Workspace
    measure: Callable[[Graph, Path], dict[str, Any]]
    table: LatencyTable
    say: Callable[[str], None]
    constant: int = 0
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    _beginnings: dict[int, Calibration] = field(default_factory=dict)  # of the calibration text, by tokens

    def run(self) -> Found:
        """Try candidates until none is left or the time is over.

        Raises:
            SearchError: none reaches the goal; says which came closest.
        """
        self._started = time.perf_counter()
        for name, passes in self._candidates():
            over = time.perf_counter() - self._started > self.goal.minutes * 60
            if over or (self.goal.trials is not None and len(self.trials) >= self.goal.trials):
                self.say(f"{name}: not tried, the {'time' if over else 'number of trials'} is used up")
                break
            trial = Trial(**self.work.stage(f"trial {name}", functools.partial(self._try, name, passes)))
            self.trials.append(trial)
            self.say(describe(trial))
            self._prefer(trial)
        if self.best is None:
            more = "loss (--max-loss)" if self.goal.max_memory is None else "memory (--max-memory)"
            raise SearchError(self._nothing(), hint=f"allow more {more}, or name a recipe (--recipe)")
        graph, records = self.work.resume(self.dense)
        return Found(graph, records, parse_passes(", ".join(self.best.passes)), self._artifact(self.best.name), self.trials, self.best)

    def _candidates(self) -> Iterator[tuple[str, list[Pass]]]:
        yield from self._precisions()
        quantize = quantization_of(parse_passes(", ".join(self.best.passes))) if self.best is not None else ()
        last = quantize_of(quantize)
        if self.goal.max_memory is not None and last is None:  # no precision reaches the goal alone
            quantize = (*_with(PRECISIONS["int4"], head_bits=4),)
        elif self.goal.max_loss is None and self.goal.speedup is None:
            return  # what computes less takes as much memory, and loses more
        else:
            yield from self._with_choices(quantize)
        yield from self._pruned(quantize)

    def _precisions(self) -> Iterator[tuple[str, list[Pass]]]:
        rounded = [p for p in _with(PRECISIONS["int4"], method="rtn") if isinstance(p, Quantize)]
        yield "int4, rounded", [*rounded]
        if not self._reached("int4, rounded"):
            yield "int4", [*PRECISIONS["int4"]]
        small = self._reached("int4, rounded") or self._reached("int4")
        fits = self.goal.fits(self._trial("int4, rounded").bytes)
        if not small or self.goal.max_loss is None or self.task not in WRITES:  # weights of 8 bits are never read faster than of 4
            if self.goal.max_memory is None or self.goal.fits(self._size(PRECISIONS["int8"])):
                yield "int8", [*PRECISIONS["int8"]]
            elif fits:
                yield "mixed, as large as allowed", self._filling()
        if not small and self._reached("int8"):
            yield "mixed", self._mixed()
        if small or not fits:
            best = rounded if self._reached("int4, rounded") else PRECISIONS["int4"]
            yield "int4, head too", _with(best, head_bits=4)
        yield from self._screened()

    def _screened(self) -> Iterator[tuple[str, list[Pass]]]:
        """The best precision with a head of 8 bits whose lower halves are read where they count: faster, and loses a little."""
        if self.best is None or self.task != "causal-lm" or find_regions(self.dense).head is None or not available():
            return
        passes = parse_passes(", ".join(self.best.passes))
        last, only_memory = quantize_of(passes), self.goal.max_loss is None and self.goal.speedup is None
        if last is not None and last.head_bits == 8 and not last.mixed and not only_memory:
            yield f"{self.best.name}, screened head", _with(passes, screen=SCREEN)

    def _with_choices(self, quantize: tuple[Pass, ...]) -> Iterator[tuple[str, list[Pass]]]:
        """What chooses inputs or experts for each token, on top of a precision."""
        last = quantize_of(quantize)
        block, label = _block(last), _label(last)
        gathered = 0.0 if last is None else max(gather_below(bits) for bits in last.mixed or (last.bits,) if bits <= 8)
        for active in (a for a in SPARSE if a <= gathered):  # only where kernels gain by it
            name = f"{active:.0%} of the inputs{label}"
            yield name, [Sparsify(active=active), *quantize]
            if self._no_less(name, SPARSE[-1] / active):
                break
        experts = self._experts(block)
        for active in ACTIVE if experts is not None else ():
            spec = f"carve-experts{{experts={experts} shared={(experts or 0) // 4}}}, fit-router{{active={active}}}, refit-down"
            name = f"{active:.0%} of {experts} experts{label}"
            yield name, [*parse_passes(spec), *_for_refitted(quantize)]
            if self._no_less(name, ACTIVE[-1] / active):
                break  # fewer neurons lose more

    def _pruned(self, quantize: tuple[Pass, ...]) -> Iterator[tuple[str, list[Pass]]]:
        last = quantize_of(quantize)
        for active in ACTIVE if find_regions(self.dense).ffns else ():
            name = f"{active:.0%} of the neurons, static{_label(last)}"
            yield name, [*parse_passes(f"prune-static{{active={active} multiple={_block(last)}}}"), *_for_refitted(quantize)]
            if self._no_less(name, ACTIVE[-1] / active):
                break

    def _size(self, passes: Iterable[Pass]) -> int:
        """Bytes of the artifact in this precision."""
        graph = self.dense.copy()
        Pipeline([p.uniform() for p in passes if isinstance(p, Quantize)]).run(graph, Context())
        return graph.weight_bytes() + self.constant

    def _filling(self) -> list[Pass]:
        """Each region as large as ``max_memory`` allows, where that helps most."""
        assert self.goal.max_memory is not None
        small, large = (_with(PRECISIONS["mixed"], mixed=(), bits=bits, head_bits=bits) for bits in (4, 8))
        (least, most), room = map(self._size, (small, large)), FILLED * self.goal.max_memory
        share = (room - least) / (most - least)
        (example,) = (p for p in PRECISIONS["mixed"] if isinstance(p, Quantize))
        low, high = (example.stored(bits) for bits in (4, 8))
        return _with(PRECISIONS["mixed"], mean=low + max(share, 0.0) * (high - low))

    def _mixed(self) -> list[Pass]:
        """Each region as small as a part of the loss limit allows, for losses are measured on few windows."""
        limit = MIXED * math.log1p(self.goal.max_loss) if self.goal.max_loss and self.task in WRITES else Quantize.max_loss
        return _with(PRECISIONS["mixed"], mixed=(4, 8, 32), max_loss=limit)

    def _experts(self, block: int) -> int | None:
        """As many experts as divide every FFN into parts that can be quantized; None when there is no such number."""
        widths = [f.d_ff for f in find_regions(self.dense).ffns]
        return most_experts(widths, range(4, EXPERTS + 1), block) if widths else None

    def _trial(self, name: str) -> Trial:
        (found,) = (t for t in self.trials if t.name == name)
        return found

    def _reached(self, name: str) -> bool:
        return any(t.name == name and self.goal.meets(t) for t in self.trials)

    def _no_less(self, name: str, least: float) -> bool:
        """Whether candidates that compute less than this one need not be tried; at least ``least`` times as much as it."""
        return self._loses_too_much(name) or self._stays_slow(name, least)

    def _stays_slow(self, name: str, least: float) -> bool:
        """Whether a candidate is so slow by the table that with ``least`` times as much to compute it still were not fast enough."""
        trial = self._trial(name)
        return trial.loss is None and not self._hopeful((trial.predicted or 0.0) / least)

    def _hopeful(self, speed: float) -> bool:
        wanted = self.goal.speedup if self.goal.speedup is not None else 1.0 if self.best is None else self.best.speed or 1.0
        return speed >= CLOSE * wanted

    def _loses_too_much(self, name: str) -> bool:
        trial, limit = self._trial(name), self.goal.max_loss
        return trial.quick or (limit is not None and trial.loss is not None and trial.loss > limit)

    def _try(self, name: str, passes: list[Pass]) -> dict[str, Any]:
        start = time.perf_counter()
        trial = Trial(name, [p.spec for p in passes], None, 0.0)
        if len(quantization_of(passes)) == len(passes) or (self._fast_enough(trial, passes) and self._good_enough(trial, passes)):
            graph, records = self._converted(passes, self.ctx.need_calibration("the search"))
            trial.bytes = None if self.goal.max_memory is None else graph.weight_bytes() + self.constant
            if self.goal.fits(trial.bytes):
                trial.quick, trial.loss = False, self._loss(graph, self.goal.max_loss)
                if self.goal.speedup is not None or self.goal.meets(trial):
                    self._time(trial, graph)
                if self._wins(trial):
                    self.work.records.clear()
                    self.work.keep(graph, records)
        trial.seconds = time.perf_counter() - start
        return dataclasses.asdict(trial)

    def _fast_enough(self, trial: Trial, passes: list[Pass]) -> bool:
        """Whether the table of latencies lets hope for the speed that is wanted: of the best candidate so far, or the dense model, the
        layers are exchanged, and the rest of the time stays."""
        best = self.best
        before = parse_passes(", ".join(best.passes)) if best is not None else []
        try:
            new, old = (self.table.per_token(self._layers, p, decoding=self.task in WRITES) for p in (passes, before))
        except DyncompError as error:
            self.say(f"{trial.name}: its latency cannot be looked up: {error}")
            return True
        speed, token = (1.0, old) if best is None else (best.speed or 1.0, best.token_seconds or old)
        trial.predicted = speed * token / max(token + new - old, 1e-2 * token)
        return self._hopeful(trial.predicted)

    @functools.cached_property
    def _layers(self) -> Mapping[Layer, int]:
        return layers_of(self.dense)

    def _good_enough(self, trial: Trial, passes: list[Pass]) -> bool:
        """Whether a candidate is worth its fitting: what it loses when fitted to little text, without delay and in float."""
        quantization = quantization_of(passes)
        fitted = [dataclasses.replace(p, budgets="uniform") if isinstance(p, Sparsify) else p for p in passes if p not in quantization]
        limit, calibration = self.goal.max_loss, self.ctx.need_calibration("the search")
        for tokens, multiple in LOOKS:
            if limit is not None and tokens < calibration.tokens:
                if tokens not in self._beginnings:
                    first = calibration.first(tokens)
                    known = fingerprint(self.fingerprint, first)
                    self._beginnings[tokens] = dataclasses.replace(calibration, batches=first, fingerprint=known, statistics={})
                graph, _ = self._converted(fitted, self._beginnings[tokens])
                trial.quick, trial.loss = True, self._loss(graph, multiple * limit)
                if trial.loss > multiple * limit:
                    return False
        return True

    def _converted(self, passes: list[Pass], calibration: Calibration) -> tuple[Graph, list[PassRecord]]:
        """The dense graph after ``passes``, fitted to ``calibration``."""
        release_memory()
        if any(p.reads_statistics for p in passes):
            calibrate(self.dense, find_regions(self.dense).ffns, calibration, progress=self.ctx.progress)
        graph = self.dense.copy()
        return graph, Pipeline(passes).run(graph, dataclasses.replace(self.ctx, calibration=calibration))

    def _loss(self, graph: Graph, allowed: float | None) -> float:
        """As in :class:`Goal`, over all windows; over the first of them where it is :data:`HOPELESS` times what is allowed."""
        if self.task not in WRITES:
            return 1 - evaluate({"dense": self.dense, "converted": graph}, self.selection, task=self.task).cosine["converted"]
        first, rest = self._selections
        losses = self._nll(graph, first) - self._dense_nll[: len(first)]
        if len(rest) and (allowed is None or math.expm1(float(losses.mean())) <= HOPELESS * allowed):
            losses = torch.cat([losses, self._nll(graph, rest) - self._dense_nll[len(first) :]])
        return math.expm1(float(losses.mean()))

    def _nll(self, graph: Graph, rows: Rows) -> Tensor:
        return evaluate({"dense": graph}, rows, task=self.task).nll["dense"]

    @functools.cached_property
    def _dense_nll(self) -> Tensor:
        return torch.cat([self._nll(self.dense, part) for part in self._selections if len(part)])

    @property
    def _selections(self) -> tuple[Rows, Rows]:
        """The first windows, and the rest. Pairs are weighted by their lengths, and stay together."""
        first = len(self.selection) if is_pairs(self.selection) else FIRST
        return self.selection[:first], self.selection[first:]

    def _time(self, trial: Trial, graph: Graph) -> None:
        folder = self._artifact(trial.name)
        shutil.rmtree(folder, ignore_errors=True)
        release_memory()
        measured = self.measure(graph, folder)
        trial.speed, trial.prefill, trial.token_seconds = measured["speed"], measured["prefill"], measured["token_seconds"]
        trial.bytes = artifact_bytes(folder)

    def _prefer(self, trial: Trial) -> None:
        """Take over a trial that reaches the goal best; artifacts of the others are removed."""
        folder = self._artifact(trial.name)
        if self._wins(trial):
            if self.best is not None:
                shutil.rmtree(self._artifact(self.best.name), ignore_errors=True)
            self.best = trial
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def _wins(self, trial: Trial) -> bool:
        return self.goal.meets(trial) and (self.best is None or self.goal.better(trial, self.best))

    def _artifact(self, name: str) -> Path:
        return self.work.folder / "artifacts" / "".join(c if c.isalnum() else "-" for c in name)

    def _nothing(self) -> str:
        if not self.trials:
            return "no candidate was tried"
        small = [t for t in self.trials if self.goal.fits(t.bytes)]
        if not small:
            closest = min(self.trials, key=lambda t: t.bytes or 0)
        elif self.goal.max_loss is not None:
            closest = min(small, key=lambda t: math.inf if t.loss is None else t.loss)
        else:
            closest = max(small, key=lambda t: t.speed or 0)
        return f"no candidate reaches {self.goal}; closest: {describe(closest)}"


def _with(passes: Iterable[Pass], **options: Any) -> list[Pass]:
    """The passes of a precision, the quantization among them with other options."""
    return [dataclasses.replace(p, **options) if isinstance(p, Quantize) else p for p in passes]


def artifact_bytes(folder: Path) -> int:
    """Of an artifact's weights and tables, an encoder's too; the graph and the kernels take little, and the same in every precision."""
    return sum(f.stat().st_size for kind in ("*.data", "parameters.bin") for f in folder.rglob(kind))


def _for_refitted(quantize: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """Weights that were regressed, or have other neighbours in their blocks, are no longer those that rounding held well."""
    last = quantize_of(quantize)
    if last is None or last.method == "gptq":
        return quantize
    return (*_with(PRECISIONS[last.label], head_bits=last.head_bits, screen=last.screen),)


def _block(quantize: Quantize | None) -> int:
    return 1 if quantize is None else quantize.block


def _label(quantize: Quantize | None) -> str:
    return "" if quantize is None else f", {quantize.label}"


def selection_size(rows: Rows, tokens: int) -> int:
    """How many of the last rows the loss is measured on: :data:`SELECTION`, or as many pairs of texts as have the tokens of so many
    windows.

    Args:
        tokens: of a window.
    """
    if isinstance(rows, SpeechRows) or not is_pairs(rows):
        return SELECTION
    written = written_lengths(rows).flip(0).cumsum(0)
    return int((written < SELECTION * tokens).sum()) + 1


def describe(trial: Trial) -> str:
    """One line: what a trial lost and gained."""
    if trial.loss is None and trial.bytes is not None:
        return f"{trial.name}: {trial.bytes / 1e6:.3g} MB"
    if trial.loss is None:
        return f"{trial.name}: {trial.predicted or 0:.2f} x dense by the table of latencies"
    speed = "" if trial.speed is None else f", {trial.speed:.2f} x dense"
    quick = " (a quick look)" if trial.quick else ""
    return f"{trial.name}: {trial.loss:+.2%} loss{quick}{speed}"
