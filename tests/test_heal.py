"""Healing: it learns, repeats itself exactly, survives being killed, and keeps what was calibrated."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dyncomp.passes import CarveExperts, FitRouter, Heal, PruneStatic, Recalibrate, RefitDown, SkipDepth
from dyncomp.passes.heal import set_apart
from heal_worker import SETTINGS as WORKER_SETTINGS
from helpers import assert_close
from safetensors.torch import load_file, save_file
from test_passes import context
from torch import Tensor

from bench.tiny import tokens, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.errors import PassError, RequestError
from dyncomp.evaluate import evaluate
from dyncomp.graph import Graph
from dyncomp.heal import Settings, Trainer
from dyncomp.heal.budget import DepthBudget
from dyncomp.heal.losses import divergence, relative_square
from dyncomp.heal.program import Program
from dyncomp.heal.weights import Weights
from dyncomp.pipeline import Context, Pass, Pipeline, parse_passes
from dyncomp.regions import find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.thresholds import find_thresholds
from dyncomp.serialize import save_graph
from dyncomp.sweep import Sweep

QUICK = {"bfloat16": False, "lr": 2e-3, "router_lr": 2.0, "vector_lr": 1.0, "batch": 8, "together": 4, "evaluations": 4}


@functools.cache
def _converted(active: float, static: bool) -> tuple[Graph, Context]:
    dense = trace_tiny("llama")
    ctx = context("llama", dense)
    ctx.text = tokens(400, 16, seed=9)
    graph = dense.copy()
    experts = [CarveExperts(experts=8, keep_dense=()), FitRouter(active=active), RefitDown()]
    Pipeline([PruneStatic(active=active, keep_dense=())] if static else experts).run(graph, ctx)
    return graph, ctx


def converted(active: float = 0.4, *, static: bool = False) -> tuple[Graph, Context]:
    """A tiny model of 8 experts a layer, and a context with text to heal it on."""
    graph, ctx = _converted(active, static)
    return graph.copy(), dataclasses.replace(ctx)


def kl(graph: Graph, ctx: Context) -> float:
    """On tokens that were not trained on."""
    assert ctx.dense is not None
    return evaluate({"dense": ctx.dense, "converted": graph}, tokens(96, 16, seed=77), task="causal-lm").kl["converted"]


def trained(graph: Graph, ctx: Context, settings: Settings, **options: Any) -> dict[str, Tensor]:
    """The weights that a run ends with."""
    assert ctx.dense is not None
    assert ctx.text is not None
    Trainer(graph, ctx.dense, ctx.text[:-8], ctx.text[-8:], settings, **options).run()
    return {name: t.detach().clone() for name, t in graph.constants().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_what_is_set_apart_is_of_documents_that_are_not_trained_on() -> None:
    """Drawn from the whole end of the text: a single document once chose the state and set every threshold."""
    trained_on, apart = set_apart(torch.arange(400)[:, None], 20, seed=3)
    assert torch.equal(trained_on.flatten(), torch.arange(340))
    assert len({*apart.flatten().tolist()}) == 20
    assert apart.min() >= 340
    assert 5 <= int((apart < 370).sum()) <= 15
    assert not torch.equal(apart, set_apart(torch.arange(400)[:, None], 40, seed=4)[1])


@pytest.mark.parametrize("rank", [0, 8])
def test_the_divergence_from_the_dense_model_falls_and_the_active_fraction_stays(rank: int) -> None:
    graph, ctx = converted()
    unseen = set_apart(ctx.text, 100)[1]
    Recalibrate().run(graph, dataclasses.replace(ctx, calibration=Calibration([{"input_ids": unseen}], "")))  # as many open as afterwards
    program, before = graph.text(), kl(graph, ctx)
    record = Pipeline([Heal(steps=60, rank=rank, **QUICK)]).run(graph, ctx)[0]
    assert kl(graph, ctx) < 0.98 * before
    assert graph.text() == program, "the program itself stays what it is"
    curve = record.result.facts["curve"]
    assert [step for step, _ in curve] == [0, 15, 30, 45, 60]
    assert curve[-1][1] < curve[0][1]
    chosen_by = set_apart(ctx.text, record.result.facts["held_out_windows"])[1]  # without tokens that skip, the same set thresholds
    before, after = record.result.facts["loss"]
    assert after < before
    now = divergence(graph(input_ids=chosen_by), ctx.dense(input_ids=chosen_by))
    assert after == pytest.approx(float(now), rel=1e-3), "with the thresholds that it is left with"
    load = evaluate({"dense": graph}, unseen, task="causal-lm").load["dense"]
    assert [load[r.name].active for r in find_routed(graph)] == pytest.approx([0.4, 0.4], abs=1e-3)


@pytest.mark.parametrize("passes", [
    [SkipDepth(what="attention", active=0.5, blocks="all", rank=4)],
    [SkipDepth(what="ffn", active=0.5, blocks="all", rank=4)],
    [SkipDepth(what="block", active=0.5, blocks="all", rank=4)],
    [CarveExperts(experts=8, keep_dense=()), FitRouter(active=0.6), SkipDepth(what="ffn", active=0.7, blocks="all", rank=4)],
], ids=["attention", "ffn", "block", "experts and ffn"])  # fmt: skip
def test_tokens_that_skip_are_healed_at_the_same_cost(passes: list[Pass]) -> None:
    dense = trace_tiny("llama")
    ctx = context("llama", dense)
    ctx.text = tokens(2000, 16, seed=9)
    graph = dense.copy()
    Pipeline(passes).run(graph, ctx)
    unseen = dataclasses.replace(ctx, calibration=Calibration([{"input_ids": set_apart(ctx.text, 500)[1]}], ""))
    Recalibrate().run(graph, unseen)
    before = kl(graph, ctx)
    assert len(find_thresholds(graph)) == 2 * len(passes[:2])
    Pipeline([Heal(steps=60, **QUICK)]).run(graph, ctx)
    assert kl(graph, ctx) < 0.98 * before
    for threshold in find_thresholds(graph):
        (scores,) = Sweep(graph, [{"input_ids": set_apart(ctx.text, 500)[1]}]).advance(threshold.scores)
        opened = (scores[:, threshold.first :, threshold.shared :] > 0).float().mean()
        assert float(opened) == pytest.approx(threshold.open, abs=0.02)  # equal tokens score alike in the first layer
    assert Weights(graph).routers >= {s.scores.args[1].target for s in find_skips(graph)}


@pytest.mark.parametrize("passes", [
    "carve-experts{experts=8 shared=2}, fit-router{active=0.6}", "skip-depth{active=0.6 blocks=all rank=4}",
])  # fmt: skip
def test_gradients_open_no_gates_on_the_whole(passes: str) -> None:
    dense = trace_tiny("llama")
    ctx = context("llama", dense)
    graph, text = dense.copy(), tokens(48, 16, seed=9)
    Pipeline(parse_passes(passes)).run(graph, ctx)
    pushed = []
    for hold in (0.0, 0.05):
        trainer = Trainer(graph, dense, text[:40], text[40:], Settings(steps=1, hold=hold, **QUICK))
        trainer._gradients(0)
        biases = [(trainer.weights(t.bias).grad[t.shared :], t) for t in trainer._thresholds]
        pushed.append(torch.stack([b.sum() for b, _ in biases]))
        assert all(float(b.abs().max()) > 0 for b, t in biases if t.scores.meta["val"].shape[-1] > 1), "between experts they still choose"
        routers = [trainer.weights(str(t.scores.args[1].target)).grad for t in trainer._thresholds]
        assert all(float(r.abs().max()) > 0 for r in routers)
    free, held = pushed
    assert bool((free < 0).all()), "every layer would open more"
    assert_close(held + free, free, rel=1e-4)


def test_layers_trade_a_budget() -> None:
    dense = trace_tiny("llama")
    ctx = context("llama", dense)
    ctx.text = tokens(400, 16, seed=9)
    graph = dense.copy()
    Pipeline([SkipDepth(what="block", active=0.8, blocks="all", rank=4)]).run(graph, ctx)
    Pipeline([Heal(steps=40, budget=0.7, **(QUICK | {"router_lr": 20.0}))]).run(graph, ctx)
    spent, shares = DepthBudget(graph), []
    for threshold in spent.thresholds:
        (scores,) = Sweep(graph, [{"input_ids": set_apart(ctx.text, 100)[1]}]).advance(threshold.scores)
        shares.append(float((scores[:, threshold.first :] > 0).float().mean()))
        assert graph.info["depth"][threshold.name.removesuffix(".depth")]["skipped"] == pytest.approx(1 - shares[-1], abs=0.01)
    assert spent.cost(shares) == pytest.approx(0.7, abs=0.01)
    assert abs(shares[0] - shares[1]) > 0.02, "each layer has the share that helps most, not the same"
    assert 1 < spent.cost([1.0, 1.0]) < 1.02, "open gates cost what there was before, and the routers"
    assert 0 < spent.cost([0.0, 0.0]) < 0.1, "stand-ins"
    with pytest.raises(RequestError, match="no token skips a layer"):
        Pipeline([Heal(steps=1, budget=0.7)]).run(dense.copy(), ctx)


def test_a_training_that_finds_nothing_better_changes_nothing() -> None:
    """Thresholds set on other text would: what is open there differs by a few points."""
    graph, ctx = converted()
    before = {name: t.detach().clone() for name, t in graph.constants().items()}
    record = Pipeline([Heal(steps=4, **(QUICK | {"lr": 0.5}))]).run(graph, ctx)[0]
    assert record.result.facts["best"] == 0
    assert_same(dict(graph.constants()), before)


def test_each_token_of_a_stream_counts_alike() -> None:
    wanted = torch.ones(1, 4, 8)
    wanted[:, 0] *= 1e3  # an attention sink
    off = wanted.clone()
    off[:, 1] += 1
    assert float(relative_square(off, wanted)) == pytest.approx(1 / 4)
    assert float(relative_square(off * 7, wanted * 7)) == pytest.approx(1 / 4)


def test_static_pruning_is_healed_by_the_same_pass() -> None:
    graph, ctx = converted(static=True)
    before = kl(graph, ctx)
    Pipeline([Heal(steps=40, **QUICK)]).run(graph, ctx)
    assert kl(graph, ctx) < 0.98 * before


def test_the_gradient_is_that_of_the_plain_graph() -> None:
    graph, ctx = converted()
    weights, ids = Weights(graph), tokens(4, 16, seed=3)
    student = Program(graph, weights, trained=weights.names)
    assert ctx.dense is not None
    with torch.no_grad():
        wanted = ctx.dense(ids)
    divergence(student({"input_ids": ids})[0], wanted, student.finish).backward()
    plain = graph.copy()
    for name in weights.names:
        plain.add_tensor(name, graph.tensor(name).detach().clone())
        plain.tensor(name).requires_grad_()
    given = plain.module(ids)[0].log_softmax(-1)
    (wanted.softmax(-1) * (wanted.log_softmax(-1) - given)).sum(-1).mean().backward()
    for name, parameter in weights.parameters().items():
        assert_close(parameter.grad, plain.tensor(name).grad, rel=1e-4)


@pytest.mark.parametrize(("architecture", "apart"), [("gemma2", True), ("phi", False)])  # a softcap after the head; a bias that is trained
def test_predictions_are_made_a_few_tokens_at_a_time(architecture: str, apart: bool) -> None:
    graph, ids = trace_tiny(architecture), tokens(9, 8, seed=4)
    weights = Weights(graph)
    student = Program(graph, weights, trained=weights.names)
    wanted = torch.randn(*ids.shape, graph.module(ids)[0].shape[-1], generator=torch.Generator().manual_seed(0))
    states, _ = student({"input_ids": ids})
    assert (states.shape[-1] != wanted.shape[-1]) == apart
    loss = divergence(states, wanted, student.finish)
    loss.backward()
    found = {name: p.grad for name, p in weights.parameters().items()}
    for p in weights.parameters().values():
        p.grad = None
    logits = student.finish(student({"input_ids": ids})[0]).log_softmax(-1)
    assert_close(logits, graph.module(ids)[0].log_softmax(-1), rel=1e-5)
    whole = (wanted.softmax(-1) * (wanted.log_softmax(-1) - logits)).sum(-1).mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for name, p in weights.parameters().items():
        assert_close(found[name], p.grad, rel=1e-4)


def test_a_norm_whose_scale_is_computed_trains_its_weight() -> None:
    graph, ids = trace_tiny("gemma3"), tokens(2, 8)
    weights = Weights(graph)
    program = Program(graph, weights, trained=weights.names)
    program.finish(program({"input_ids": ids})[0]).square().mean().backward()
    for name in (names := [n for n in weights.names if "norm" in n]):
        graph.add_tensor(name, graph.tensor(name).detach().clone())
        graph.tensor(name).requires_grad_()
    graph.module(ids)[0].square().mean().backward()
    for name in names:
        assert_close(weights(name).grad, graph.tensor(name).grad, rel=1e-4)
    assert len(names) > 8


@pytest.mark.parametrize("passes", [
    "carve-experts{experts=8}, fit-router{active=0.6}", "skip-depth{active=0.6 blocks=all rank=4}", "sparsify{active=0.6 where=all}",
    "sparsify{active=0.6 where=all}, skip-depth{active=0.6 blocks=all rank=4}",
])  # fmt: skip
def test_products_in_bfloat16_train_as_those_in_float32(passes: str) -> None:
    dense = trace_tiny("llama")
    graph, ids = dense.copy(), tokens(8, 16, seed=3)
    Pipeline(parse_passes(passes)).run(graph, context("llama", dense))
    with torch.no_grad():
        wanted = dense(ids)
    gradients, scores = [], [t.scores.name for t in find_thresholds(graph)]
    for half in (False, True):
        weights = Weights(graph)
        student = Program(graph, weights, trained=weights.names, bfloat16=half)
        states, found = student({"input_ids": ids}, [student.find(name) for name in scores])
        assert {s.dtype for s in found} <= {torch.float32}, "which gates open hangs on small differences"
        divergence(states, wanted, student.finish).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in weights.parameters().values() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.97


def test_gradient_checkpoints_change_nothing_but_memory() -> None:
    graph, ctx = converted()
    settings = Settings(steps=3, hidden=0.1, **QUICK)
    plain = trained(graph.copy(), ctx, settings)
    program = Program(graph, checkpoints=True)
    assert len(program._segments) >= 4
    assert_same(trained(graph, ctx, dataclasses.replace(settings, checkpoints=True)), plain)


def test_two_runs_are_identical_and_seeds_differ() -> None:
    graph, ctx = converted()
    settings = Settings(steps=4, rank=2, **QUICK)
    first = trained(graph.copy(), ctx, settings, seed=1)
    assert_same(trained(graph.copy(), ctx, settings, seed=1), first)
    other = trained(graph.copy(), ctx, settings, seed=2)
    assert any(not torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, rank: int) -> None:
    graph, ctx = converted()
    settings = Settings(steps=8, rank=rank, patience=9, **QUICK)
    whole = trained(graph.copy(), ctx, settings)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:  # the last checkpoint is that of step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(graph.copy(), ctx, settings, folder=tmp_path, progress=stop)
    seen: list[int] = []
    resumed = trained(graph.copy(), ctx, settings, folder=tmp_path, progress=lambda stage, done, total: seen.append(done))
    assert seen == [5, 6, 7, 8]
    assert_same(resumed, whole)
    assert [f.suffix for f in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]


def test_a_checkpoint_of_another_request_is_not_taken_up(tmp_path: Path) -> None:
    graph, ctx = converted()
    trained(graph.copy(), ctx, Settings(steps=4, **QUICK), folder=tmp_path)
    seen: list[int] = []
    settings = Settings(steps=5, **QUICK)
    trained(graph.copy(), ctx, settings, folder=tmp_path, progress=lambda stage, done, total: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]
    seen.clear()
    other, _ = converted(static=True)
    trained(other, ctx, settings, folder=tmp_path, progress=lambda stage, done, total: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]


def test_a_batch_shared_by_two_processes_gives_the_same_weights(tmp_path: Path) -> None:
    """Sums of gradients are taken in another order: equal up to that, magnified by the optimiser's division."""
    graph, ctx = converted()
    assert ctx.dense is not None
    assert ctx.text is not None
    for name, value in {"graph": graph, "dense": ctx.dense}.items():
        save_graph(value, tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors")
    save_file({"text": ctx.text}, tmp_path / "text.safetensors")
    script = Path(__file__).with_name("heal_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    shared = [load_file(tmp_path / f"trained-{rank}.safetensors") for rank in (0, 1)]
    assert_same(shared[1], shared[0])
    alone = trained(graph, ctx, WORKER_SETTINGS)
    assert any(not torch.equal(alone[name], ctx.dense.tensor(name)) for name in shared[0] if name in ctx.dense.constants())
    for name, value in shared[0].items():
        assert_close(value, alone[name], rel=1e-4)


def test_what_cannot_be_healed_is_refused() -> None:
    graph, ctx = converted()
    with pytest.raises(RequestError, match="text to train on"):
        Pipeline([Heal(steps=1)]).run(graph.copy(), dataclasses.replace(ctx, text=None))
    with pytest.raises(RequestError, match="3 windows of text are too few"):
        Pipeline([Heal(steps=1)]).run(graph.copy(), dataclasses.replace(ctx, text=tokens(3, 16)))
    with pytest.raises(RequestError, match="no dense model"):
        Pipeline([Heal(steps=1)]).run(graph.copy(), dataclasses.replace(ctx, dense=None))
    with pytest.raises(RequestError, match=r"quantized.*\n.*before quantize"):
        Pipeline(parse_passes("quantize, heal{steps=1}")).run(graph.copy(), ctx)
    broken = graph.copy()
    broken.add_tensor("model.model.layers.0.mlp.experts.b_down", torch.full((32,), float("nan")))
    with pytest.raises(PassError, match="diverged at step 1"):
        trained(broken, ctx, Settings(steps=1, **QUICK))
    for wrong in ("minutes=0", "steps=-1", "lr=0", "rank=-1", "batch=4 together=3", "hidden=-1"):
        with pytest.raises(RequestError, match="heal"):
            parse_passes(f"heal{{{wrong}}}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
