"""Healing: a converted graph is trained to give what the dense one gives (distillation, Hinton et al., 1503.02531)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.errors import PassError
from dyncomp.evaluate import model_inputs
from dyncomp.examples import row_tokens
from dyncomp.graph import Graph
from dyncomp.heal import ranks, state
from dyncomp.heal.budget import DepthBudget
from dyncomp.heal.held_out import HeldOut, pieces
from dyncomp.heal.losses import output_loss, relative_square
from dyncomp.heal.program import Program
from dyncomp.heal.settings import Settings
from dyncomp.heal.weights import Weights
from dyncomp.pipeline import Progress, no_progress
from dyncomp.regions import find_regions, find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.router import find_scores, selection_bias
from dyncomp.regions.thresholds import find_thresholds
from dyncomp.routing import balance_loss, bias_step, noisy, within_capacity, z_loss
from dyncomp.rows import Rows, split_rows, tensors_of

_TIMED = 2


@dataclass
class Healed:
    """What a run did.

    Args:
        steps: that the schedule had; ``best``: the one whose weights were kept.
        tokens: seen until the end.
        curve: (step, loss on the held-out windows), step 0 before training.
        changed: names of the constants that were trained.
    """

    steps: int
    best: int
    tokens: int
    seconds: float
    cpu_seconds: float
    curve: list[tuple[int, float]]
    changed: list[str]


@dataclass(frozen=True)
class _Router:
    """One routed FFN as it is watched: nodes of the program, the name of the bias that chooses experts, and the active fraction it
    should have."""

    gates: fx.Node
    scores: fx.Node
    bias: str | None
    active: float
    shared: int


class Trainer:
    """Trains ``graph`` against ``dense``.

    Args:
        graph: gets the trained weights at the end; nothing else in it changes.
        windows: what to train on. held_out: those that choose the best state.
        folder: for checkpoints; None keeps none.
    """

    def __init__(
        self, graph: Graph, dense: Graph, windows: Rows, held_out: Rows, settings: Settings, *, seed: int = 0,
        folder: Path | None = None, progress: Progress = no_progress,
    ) -> None:  # fmt: skip
        self.settings, self._windows, self._held_out, self._seed = settings, windows, held_out, seed
        self._folder, self._progress = folder, progress
        self.task = str(graph.info.get("task", "causal-lm"))
        self.weights = Weights(graph, rank=settings.rank, seed=seed)
        self.student = Program(graph, self.weights, trained=self.weights.names, bfloat16=settings.half, checkpoints=settings.checkpoints)
        self.teacher = Program(dense, bfloat16=settings.half)
        self._routers = _routers(self.student.graph)
        self._streams = _streams(self.student.graph, self.teacher.graph) if settings.hidden else ([], [])
        self._thresholds = find_thresholds(self.student.graph)
        self._of_tokens = {s.scores for s in find_skips(self.student.graph)}
        self._budget = DepthBudget(self.student.graph) if settings.budget else None
        traded = {t.scores for t in self._budget.thresholds} if self._budget else set()
        self.unseen = HeldOut(self.teacher, pieces(self.student.graph, held_out)[ranks.rank() :: ranks.world()], self.task)
        self._levels = [torch.zeros(()) for _ in self._thresholds]
        self._watched: dict[fx.Node, Callable[[Tensor], Tensor]] = (
            {t.scores: partial(self._watch, i) for i, t in enumerate(self._thresholds) if t.scores not in traded} if settings.hold else {}
        )
        self._in_training = self._changes()
        self._optimizer = self._make_optimizer()
        self._key = self._identity()

    def run(self) -> Healed:
        """Train, keep the best state, write it into the graph.

        Raises:
            PassError: the loss is no longer a number.
        """
        started, cpu = time.perf_counter(), time.process_time()
        known = state.load(self._folder, self._key) if self._folder is not None else None
        if known is not None:
            self._at, tensors = known
            best = self._restore(tensors)
        else:
            first = self._evaluate()
            self._at, best = state.Progressed(self.settings.steps or self._affordable(), curve=[(0, first)]), self.weights.state()
        every = max(1, math.ceil(self._at.steps / self.settings.evaluations))
        while self._at.done < self._at.steps and self._at.looks_since_best < self.settings.patience:
            self._step(self._at.done)
            self._at.done += 1
            self._progress("heal", self._at.done, self._at.steps)
            if self._at.done % every == 0 or self._at.done == self._at.steps:
                self._at.curve.append((self._at.done, self._evaluate()))
                if self._at.best == self._at.done:
                    best = self.weights.state()
                if self._folder is not None and ranks.rank() == 0:
                    state.save(self._folder, self._key, self._at, self._snapshot(best))
        self.weights.load(best)
        changed = self.weights.merge()
        tokens = self._at.done * self.settings.batch * row_tokens(self.student.graph, self._windows)
        return Healed(
            self._at.steps, self._at.best, tokens, time.perf_counter() - started, time.process_time() - cpu, self._at.curve, changed
        )

    # ---- one step ----------------------------------------------------------------------------------------------------
    def _step(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, self._at.steps)
        load, levels = self._gradients(step)
        parameters = list(self.weights.parameters().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(norm)):
            raise PassError(f"healing diverged at step {step + 1}: the gradient is not finite", hint="lower the learning rate (lr)")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._move_biases(load, levels)

    def _gradients(self, step: int) -> tuple[list[Tensor], Tensor]:
        """Accumulate the gradient of the batch's mean loss, over all processes.

        Returns:
            For each router its load, [E], and the score at which as many gates are open as should be, [thresholds].
        """
        s = self.settings
        parts = split_rows(self._batch(step), s.together or max(1, s.batch // ranks.world()))
        load = [torch.zeros(r.gates.meta["val"].shape[-1]) for r in self._routers]
        levels = torch.zeros(len(self._thresholds))
        for part, ids in list(enumerate(parts))[ranks.rank() :: ranks.world()]:
            with _noise_of(self._seed, step, part) if s.noise else contextlib.nullcontext():
                loss, gates = self._loss(ids)
                (loss * len(ids) / s.batch).backward()
            for index, gate in enumerate(gates):
                load[index] += (gate.detach() != 0).float().flatten(0, -2).mean(0) * len(ids) / s.batch
            for index, level in enumerate(self._levels):
                levels[index] += level * len(ids) / s.batch
        for p in self.weights.parameters().values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        ranks.add_up([*(p.grad for p in self.weights.parameters().values() if p.grad is not None), *load, levels])
        return load, levels

    def _loss(self, ids: Rows) -> tuple[Tensor, list[Tensor]]:
        """(loss, gates of every router)"""
        s = self.settings
        ours, theirs = self._streams
        with torch.no_grad():
            wanted, streams = self.teacher(model_inputs(self.teacher.graph, ids), theirs)
        tokens = self._budget.thresholds if self._budget else []
        watch = [*(r.gates for r in self._routers), *(r.scores for r in self._routers), *ours, *(t.gates for t in tokens)]
        output, values = self.student(model_inputs(self.student.graph, ids), watch, self._in_training)
        count = len(self._routers)
        gates, scores = values[:count], values[count : 2 * count]
        ours_now, computed = values[2 * count : 2 * count + len(ours)], values[2 * count + len(ours) :]
        loss = output_loss(output, wanted, self.task, self.student.finish, self.teacher.finish)
        if s.hidden:
            loss = loss + s.hidden * torch.stack([relative_square(a, b) for a, b in zip(ours_now, streams, strict=True)]).mean()
        if s.balance and scores:
            loss = loss + s.balance * torch.stack([balance_loss(v, g) for v, g in zip(scores, gates, strict=True)]).mean()
        if s.z_loss and scores:
            loss = loss + s.z_loss * torch.stack([z_loss(v) for v in scores]).mean()
        if s.sparsity and gates:
            off = torch.stack([g.float().mean() - r.active for g, r in zip(gates, self._routers, strict=True)])
            loss = loss + s.sparsity * off.square().mean()
        if self._budget is not None:
            spent = self._budget.cost([g[:, t.first :].float().mean() for g, t in zip(computed, tokens, strict=True)])
            loss = loss + s.budget_weight * (spent - s.budget) ** 2
        return loss, gates

    @torch.no_grad()
    def _move_biases(self, load: list[Tensor], levels: Tensor) -> None:
        """Thresholds follow the fraction of gates that should be open; with ``balance_rate``, experts' biases follow equal load."""
        for threshold, level in zip(self._thresholds, levels, strict=True):
            self.weights(threshold.bias)[threshold.shared :] -= self.settings.hold * level
        for router, used in zip(self._routers, load, strict=True):
            if router.bias is None:
                continue
            bias = self.weights(router.bias)
            bias = bias[router.shared :] if len(bias) == len(used) else bias
            bias += bias_step(used[router.shared :][-len(bias) :], self.settings.balance_rate)

    def _batch(self, step: int) -> Rows:
        """As many rows as a batch has: every window once an epoch, in an order that depends on seed and epoch only."""
        count, first = len(self._windows), step * self.settings.batch
        rows = []
        for index in range(first, first + self.settings.batch):
            epoch, place = divmod(index, count)
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            rows.append(int(torch.randperm(count, generator=generator)[place]))
        return self._windows[rows]

    def _evaluate(self) -> float:
        """Mean loss on the held-out windows, thresholds following each of their pieces."""
        total = torch.tensor([self.unseen.total(self.student, self._watched)], dtype=torch.float64)
        ranks.add_up([total])
        return float(total) / len(self._held_out)

    def _affordable(self) -> int:
        """Steps that fit into the minutes, evaluations included."""
        start = time.perf_counter()
        self._evaluate()
        evaluation = time.perf_counter() - start
        for _ in range(_TIMED):  # the first one warms up
            start = time.perf_counter()
            self._gradients(0)
            self._optimizer.zero_grad()
            step = time.perf_counter() - start
        left = self.settings.minutes * 60 - evaluation * (self.settings.evaluations + 2) - step * _TIMED
        return ranks.agreed(max(1, int(left / (step * 1.03))))

    def _watch(self, index: int, scores: Tensor) -> Tensor:
        """Keep as many gates open as should be.

        Gradients alone would open more, for each open gate helps. Their part that opens or closes gates on the whole is taken out (the
        multiplier of the constraint), so that a gate opens where it helps more than another.

        Of experts there are many gates a batch, and its scores are moved so that as many are open as should be (BatchTopK, 2412.06410).
        The gates of tokens are few, and a batch is not the text: a router of the first layer knows tokens by name, and one document's
        digits may all be beyond its threshold. There thresholds follow slowly (``hold``).
        """
        threshold = self._thresholds[index]
        if scores.requires_grad:
            slope = torch.sigmoid(scores.detach())
            slope = slope * (1 - slope)
            slope[..., : threshold.shared] = 0
            scores.register_hook(lambda grad: grad - slope * (grad[..., threshold.shared :].sum() / slope.sum().clamp_min(1e-12)))
        self._levels[index] = level = threshold.level(scores)
        return scores if threshold.scores in self._of_tokens else threshold.moved(scores, level)

    def _disturb(self, watch: Callable[[Tensor], Tensor] | None, scores: Tensor) -> Tensor:
        scores = noisy(scores, self.settings.noise)
        return watch(scores) if watch else scores

    def _changes(self) -> dict[fx.Node, Callable[[Tensor], Tensor]]:
        """What training does to scores and gates, and nothing else."""
        s = self.settings
        found: dict[fx.Node, Callable[[Tensor], Tensor]] = dict(self._watched)
        for router in self._routers:
            if s.noise:
                found[router.scores] = partial(self._disturb, self._watched.get(router.scores))
            if s.capacity:
                found[router.gates] = partial(_limited, shared=router.shared, factor=s.capacity)
        return found

    # ---- optimiser and checkpoints -----------------------------------------------------------------------------------
    def _make_optimizer(self) -> torch.optim.AdamW:
        s, parameters = self.settings, self.weights.parameters()
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for name, p in parameters.items():
            rate = s.router_lr if name in self.weights.routers else s.vector_lr if p.ndim == 1 else 1.0
            groups.setdefault(s.lr * rate, []).append(p)
        grouped = [{"params": params, "peak": peak} for peak, params in groups.items()]
        return torch.optim.AdamW(grouped, lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def _identity(self) -> str:
        """Of everything a run's result depends on: the options, the text, and the weights it begins with."""
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(self.settings), self._seed]).encode())
        for part in (*tensors_of(self._windows), *tensors_of(self._held_out), *(p.detach() for p in self.weights.parameters().values())):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _snapshot(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {f"now::{n}": t for n, t in self.weights.state().items()} | {f"best::{n}": t for n, t in best.items()}
        for name, p in self.weights.parameters().items():
            tensors |= {f"{part}::{name}": value for part, value in self._optimizer.state[p].items()}
        return tensors

    def _restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition("::")
            parts.setdefault(part, {})[rest] = value
        best = parts.pop("best")
        self.weights.load(parts.pop("now"))
        for name, p in self.weights.parameters().items():
            self._optimizer.state[p] = {part: values[name] for part, values in parts.items()}
        return best


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up over a twentieth of the steps, then a cosine down to 2 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextlib.contextmanager
def _noise_of(seed: int, step: int, part: int) -> Iterator[None]:
    """Random numbers that depend on these alone, so that a run that was interrupted repeats them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + part)
        yield


def _limited(gates: Tensor, shared: int, factor: float) -> Tensor:
    """Gates within the experts' capacity; shared experts take every token."""
    return torch.cat([gates[..., :shared], within_capacity(gates[..., shared:], factor)], -1)


def _routers(graph: Graph) -> list[_Router]:
    """Routed FFNs whose gates a router computes; others (a fixed mask, a table of token ids, one expert) have nothing to guide."""
    found, facts = [], graph.info.get("routing", {})
    for region in find_routed(graph):
        noted, scores = facts.get(region.name, {}), find_scores(graph, region)
        if scores is not None and region.experts > 1:
            bias = selection_bias(graph, region, scores)
            found.append(_Router(region.gates, scores, bias, noted.get("active", 1.0), noted.get("shared", 0)))
    return found


def _streams(student: Graph, teacher: Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The residual streams after the blocks that both graphs have, by name."""
    theirs = {b.name: b.output for b in _blocks(teacher)}
    pairs = [(b.output, theirs[b.name]) for b in _blocks(student) if b.name in theirs]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _blocks(graph: Graph) -> Iterator[Any]:
    return (b for b in find_regions(graph).blocks if b.kind != "attention")
