"""Search the parameters of kernels: candidates in a fixed order, each built, checked, and timed in turns with the default."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from dyncomp.backends.tvm.kernels.tile import Tile
from dyncomp.backends.tvm.machine import Machine
from dyncomp.backends.tvm.run import Array, aligned_copy, aligned_zeros, load_runtime, use_threads
from dyncomp.backends.tvm.shapes import Shape, Tensors, describe, parameters
from dyncomp.backends.tvm.tuned import Database, Entry, Parameters, Trial, sources

from dyncomp.errors import BackendError

ROUNDS = 15
"""Of a first look; a winner is looked at again for twice as many."""
SAMPLE = 2e-3
"""Seconds that one timing takes at least."""
COLD = 64 << 20
"""Bytes of weights that calls take turns with, as the layers of a model do: none is in the cache when it is needed."""
TOLERANCE = 1e-5
"""Of a candidate's result, relative to the largest value."""


@dataclass(frozen=True)
class Timing:
    """A candidate beside the default, by number of tokens.

    Args:
        ratio: seconds of the default over those of the candidate, median of the rounds.
        noise: how far from 1 the ratio of two copies of the default may be.
    """

    ratio: dict[int, float]
    noise: dict[int, float]

    @property
    def gain(self) -> float:
        """Geometric mean over the numbers of tokens."""
        return math.exp(statistics.fmean(math.log(r) for r in self.ratio.values()))

    @property
    def wins(self) -> bool:
        """By more than the noise in the mean, and nowhere slower by more than it."""
        return self.gain > 1 + max(self.noise.values()) and all(r * (1 + self.noise[t]) >= 1 for t, r in self.ratio.items())


Measure = Callable[[Shape, Tile, Tile, Sequence[int], int], Timing]
"""(shape, default, candidate, numbers of tokens, rounds) -> how they compare. Raises BackendError for a candidate that cannot be used."""


@dataclass(frozen=True)
class Task:
    """A shape to tune, the numbers of tokens it is called with, and how often a graph calls it."""

    shape: Shape
    tokens: tuple[int, ...]
    calls: int = 1

    @property
    def bytes(self) -> int:
        return self.calls * self.shape.bytes


def candidates(shape: Shape, default: Tile, machine: Machine, threads: int, seed: int = 0) -> list[Tile]:
    """What may be tried, in order: what differs from the default in one thing first; among those, as the seed shuffles them."""
    registers = 32 if machine.lanes == 16 or machine.architecture == "aarch64" else 16
    sizes = [
        (vectors, rows)
        for vectors, rows in itertools.product((1, 2, 3, 4, 6, 8), (2, 3, 4, 6, 8, 12))
        if registers // 4 <= vectors * rows <= registers - vectors - 1 and (vectors == 1 or (vectors - 1) * machine.lanes < shape.width)
    ]
    splits = sorted({1, threads, 2 * threads}) if threads > 1 else [1]
    found = []
    for (vectors, rows), unroll, parts, split in itertools.product(sizes, (1, 2, 4), (1, 2, 3, 4), splits):
        tile = dataclasses.replace(default, vectors=vectors, rows=rows, unroll=unroll, parts=parts, split=split)
        if tile != default and shape.allows(tile) and (parts == 1 or shape.depth_of(tile) // parts >= 128):
            found.append(tile)
    random.Random(seed).shuffle(found)

    def differences(tile: Tile) -> int:
        size = (tile.vectors, tile.rows) != (default.vectors, default.rows)
        return size + sum(getattr(tile, name) != getattr(default, name) for name in ("unroll", "parts", "split"))

    return sorted(found, key=differences)


def tune(
    tasks: Sequence[Task],
    machine: Machine,
    database: Database,
    *,
    measure: Measure,
    seconds: float,
    seed: int = 0,
    limit: int | None = None,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Entry]:
    """Try candidates for each task until the time is up, and keep what wins; what the database has tried is not tried again.

    Each task gets an equal share of the time that is left, those with the most weights first. Every trial is saved when it is done.

    Args:
        machine: its number of threads is what the kernels are tuned for.
        limit: candidates of each task at most.
        again: forget what the database has for these tasks.

    Returns:
        an entry for each task, in their order.
    """
    default, report = Tile.of(machine), progress or (lambda stage, done, total: None)
    known, found, end = database.entries(), {}, time.monotonic() + seconds
    order = sorted(tasks, key=lambda t: -t.bytes)
    for number, task in enumerate(order):
        entry = Entry(
            kernel=task.shape.kernel, shape=dataclasses.asdict(task.shape), architecture=machine.architecture,
            vector=list(machine.vector), threads=machine.threads, sources=sources(),
        )  # fmt: skip
        if not again:
            entry = known.get(entry.key, entry)
        found[task.shape] = entry
        now = time.monotonic()
        deadline = now + (end - now) / (len(order) - number)
        tried = [t.parameters.model_dump() for t in entry.trials]
        offered = candidates(task.shape, default, machine, machine.threads, seed)[:limit]
        left = [tile for tile in offered if parameters(tile) not in tried]
        stage = f"{task.shape.kernel} {describe(task.shape)}"
        for tile in left:
            if time.monotonic() >= deadline:
                break
            report(stage, len(offered) - len(left), len(offered))
            _try(entry, task, default, tile, measure)
            database.put(entry)
            left = left[1:]
        report(stage, len(offered), len(offered))
    return [found[t.shape] for t in tasks]


def _try(entry: Entry, task: Task, default: Tile, tile: Tile, measure: Measure) -> None:
    """Look at a candidate; one that beats the default, and what was found before, is looked at again before it is taken."""
    trial = Trial(parameters=Parameters(**parameters(tile)))
    try:
        for rounds in (ROUNDS, 2 * ROUNDS):
            timing = measure(task.shape, default, tile, task.tokens, rounds)
            trial.ratio, trial.noise = ({str(t): v for t, v in values.items()} for values in (timing.ratio, timing.noise))
            best = 1.0 if entry.chosen is None else Timing(_counts(entry.chosen.ratio), _counts(entry.chosen.noise)).gain
            trial.taken = timing.wins and timing.gain > best
            if not trial.taken:
                break
    except BackendError as error:
        trial.failed = error.what
    entry.trials.append(trial)
    if trial.taken:
        entry.best = len(entry.trials) - 1


def _counts(values: dict[str, float]) -> dict[int, float]:
    return {int(tokens): value for tokens, value in values.items()}


# ---- measuring -----------------------------------------------------------------------------------------------------
class Stopwatch:
    """Builds kernels and times them here. A single thread is timed in CPU time, in which other programs do not count."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._configure = load_runtime().get_global_func("runtime.config_threadpool")
        self._clock = time.thread_time if machine.threads == 1 else time.perf_counter
        self._shape: tuple[Shape, Tile] | None = None
        self._weights: Tensors = ()
        self._defaults: list[_Built] = []
        self._candidate: _Built | None = None

    def __call__(self, shape: Shape, default: Tile, candidate: Tile, tokens: Sequence[int], rounds: int) -> Timing:
        """As :data:`Measure`.

        Raises:
            BackendError: the candidate does not build, or its result is wrong.
        """
        use_threads(self._configure, self.machine.threads)
        if self._shape != (shape, default):
            self._shape, self._defaults, self._candidate = None, [], None
            self._weights = shape.weights(torch.Generator().manual_seed(0))
            function = compiled(shape, default, self.machine)
            self._defaults = [_Built(shape, default, self._weights, function) for _ in range(2)]
            self._shape = shape, default
        if self._candidate is None or self._candidate.tile != candidate:
            self._candidate = None  # its memory first
            made = _Built(shape, candidate, self._weights, compiled(shape, candidate, self.machine))
            made.check(self._weights)
            self._candidate = made
        built = [*self._defaults, self._candidate]
        ratio, noise = {}, {}
        for count in tokens:
            calls = self._calls(built[0], count)
            for kernel in built:
                kernel.run(count, 1)
            first, second, mine = zip(*self._rounds(built, count, calls, rounds), strict=True)
            ratio[count] = statistics.median(math.sqrt(a * b) / c for a, b, c in zip(first, second, mine, strict=True))
            noise[count] = spread([a / b for a, b in zip(first, second, strict=True)])
        return Timing(ratio, noise)

    def _rounds(self, built: list[_Built], tokens: int, calls: int, rounds: int) -> Iterator[list[float]]:
        """Seconds of each kernel, round by round; who begins changes."""
        for turn in range(rounds):
            seconds = [0.0] * len(built)
            for index in range(len(built)):
                at = (index + turn) % len(built)
                seconds[at] = self._seconds(built[at], tokens, calls)
            yield seconds

    def _calls(self, kernel: _Built, tokens: int) -> int:
        """How often to call a kernel so that the clock can tell."""
        calls = 1
        while (taken := self._seconds(kernel, tokens, calls)) < SAMPLE and calls < 1 << 16:
            calls = max(2 * calls, math.ceil(calls * min(SAMPLE / max(taken, 1e-9), 100)))
        return calls

    def _seconds(self, kernel: _Built, tokens: int, calls: int) -> float:
        start = self._clock()
        kernel.run(tokens, calls)
        return max(self._clock() - start, 1e-9)


def spread(ratios: Sequence[float]) -> float:
    """How far from 1 the median of these ratios may be: the farther end of its 95 % interval, by order statistics."""
    ordered, count = sorted(ratios), len(ratios)
    rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return math.exp(max(abs(math.log(ordered[rank])), abs(math.log(ordered[count - 1 - rank])))) - 1


def compiled(shape: Shape, tile: Tile, machine: Machine) -> Any:
    """Raises:
    BackendError: TVM cannot compile the kernel.
    """
    try:
        module = tvm.IRModule({"main": shape.build(tile).with_attr("global_symbol", "main")})
        return tvm.compile(module, target=machine.target())["main"]
    except Exception as error:
        raise BackendError(f"TVM cannot compile it: {' '.join(str(error).split())[:200]}") from error


class _Built:
    """A compiled kernel with weights that calls take turns with."""

    def __init__(self, shape: Shape, tile: Tile, weights: Tensors, function: Any) -> None:
        self.shape, self.tile, self._function = shape, tile, function
        packed = [aligned_copy(t.numpy()) for t in shape.packed(weights, tile)]
        copies = max(1, -(-COLD // sum(a.nbytes for a in packed)))
        self._copies = [_bound(packed if i == 0 else [aligned_copy(a) for a in packed]) for i in range(min(copies, 64))]
        self._prepared: dict[int, tuple[list[Any], Any, Array]] = {}
        self._turn = 0

    def run(self, tokens: int, calls: int) -> Array:
        if tokens not in self._prepared:
            inputs = self.shape.inputs(tokens, torch.Generator().manual_seed(1))
            y = aligned_zeros([tokens, self.shape.rows], "float32")
            self._prepared[tokens] = _bound([aligned_copy(t.numpy()) for t in inputs]), _bound([y])[0], y
        inputs, result, y = self._prepared[tokens]
        for _ in range(calls):
            self._function(*inputs, *self._copies[self._turn % len(self._copies)], result)
            self._turn += 1
        return y

    def check(self, weights: Tensors) -> None:
        """Hold it against PyTorch, for one token and for some that do not fill its tiles.

        Raises:
            BackendError: its result is wrong.
        """
        for tokens in (1, 2 * self.tile.rows + 3):
            inputs = self.shape.inputs(tokens, torch.Generator().manual_seed(1))
            expected = self.shape.reference(inputs, weights)
            error = float((torch.from_numpy(self.run(tokens, 1)) - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE:
                raise BackendError(f"its result is wrong for {tokens} tokens: relative error {error:.1e}")


def _bound(arrays: Sequence[Array]) -> list[Any]:
    return [tvm.runtime.from_dlpack(a) for a in arrays]
