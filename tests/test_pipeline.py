"""Specs, checks and failures of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import dyncomp.passes  # noqa: F401
import pytest
import torch
from dyncomp.passes import CarveExperts, FitRouter

from bench.tiny import tokens, trace_tiny
from dyncomp.errors import PassError, RequestError
from dyncomp.pipeline import Context, Pass, PassResult, Pipeline, make_pass, parse_passes

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleOutput(Pass):
    """before: return y    after: return y * factor"""

    name: ClassVar[str] = "test-scale-output"
    tolerance: ClassVar[float | None] = 1e-3
    factor: float = 1.0

    def run(self, graph, ctx):
        (out,) = graph.output_nodes
        with graph.inserting(after=out) as builder:
            scaled = builder.call(aten.mul.Tensor, out, self.factor)
        out.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return PassResult(changed=["output"])


@dataclass(frozen=True)
class Break(Pass):
    name: ClassVar[str] = "test-break"

    def run(self, graph, ctx):
        raise ValueError("the wheels came off")


def probe() -> Context:
    return Context(probe={"input_ids": tokens(2, 5)})


def test_a_spec_is_a_pass_and_back() -> None:
    spec = "carve-experts{experts=8 shared=2 keep-dense=0+-1}, fit-router{active=50% gates=topk}, refit-down"
    passes = parse_passes(spec)
    assert passes[0] == CarveExperts(experts=8, shared=2, keep_dense=(0, -1))
    assert passes[1] == FitRouter(active=0.5, gates="topk")
    assert parse_passes(", ".join(p.spec for p in passes)) == passes
    assert [p.spec for p in passes][2] == "refit-down"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("carve-expertz", ["carve-expertz", "carve-experts"]),
        ("carve-experts{expert=8}", ["no option 'expert'", "experts"]),
        ("carve-experts{experts}", ["not option=value"]),
        ("carve-experts{experts=many}", ["many", "int"]),
        ("carve-experts{experts=8", ["cannot read"]),
        ("carve-experts{experts=4 shared=4}", ["shared"]),
        ("carve-experts{cluster=magic}", ["magic", "coactivation"]),
        ("fit-router{active=0}", ["not in (0, 1]"]),
        ("fit-router{active=150%}", ["1.5"]),
        ("fit-router{gates=soft}", ["soft", "topk"]),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        parse_passes(spec)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_pass_beyond_its_tolerance_is_named_with_those_before_it() -> None:
    graph = trace_tiny("llama")
    with pytest.raises(PassError) as error:
        Pipeline([ScaleOutput(), ScaleOutput(factor=1.01)]).run(graph, probe())
    assert "'test-scale-output{factor=1.01}' failed (after test-scale-output)" in str(error.value)
    assert "differ by" in str(error.value)


def test_a_crash_is_named_and_chained() -> None:
    with pytest.raises(PassError, match="'test-break' failed: ValueError: the wheels came off") as error:
        Pipeline([Break()]).run(trace_tiny("llama"), probe())
    assert isinstance(error.value.__cause__, ValueError)


def test_records_and_dumps(tmp_path) -> None:
    seen = []
    records = Pipeline([make_pass("test-scale-output", "factor=1")], tmp_path).run(trace_tiny("llama"), probe(), on_done=seen.extend)
    assert seen == records
    assert records[0].relative_error == 0.0
    assert records[0].result.changed == ["output"]
    assert "mul.Tensor" in (tmp_path / "00-test-scale-output.txt").read_text()


def test_not_a_number_is_always_an_error() -> None:
    with pytest.raises(PassError, match=r"nan|inf"):
        Pipeline([ScaleOutput(factor=float("nan"))]).run(trace_tiny("llama"), probe())


@pytest.mark.parametrize(
    ("widths", "experts"),
    [((1536,), 48), ((8192,), 64), ((14336, 14336), 64), ((3072, 1536), 48), ((128,), 16), ((100,), 10), ((7,), 7), ((), 16), ((13,), 13)],
)
def test_experts_suit_the_widths(widths: tuple[int, ...], experts: int) -> None:
    """Many, of whole blocks of 32 neurons; of narrow FFNs what divides them."""
    from dyncomp.recipe import load_recipe, suitable_experts

    assert suitable_experts(widths) == experts
    assert all(w % experts == 0 for w in widths)
    carve = load_recipe(None).resolve(widths=widths)[0]
    assert (carve.experts, carve.shared) == (experts, experts // 4)
    assert load_recipe(None).resolve(widths=widths, experts=8)[0].experts == 8


def test_every_recipe_resolves_and_what_it_fixes_is_not_overridden() -> None:
    from dyncomp.recipe import RECIPES

    for name, recipe in RECIPES.items():
        assert name == "dense" or recipe.resolve()
    specs = [p.spec for p in RECIPES["qwen-moe-64x8"].resolve()]
    assert specs == ["carve-experts{experts=64 shared=4 keep-dense=}", "fit-router{gates=topk k=8 bias=false}", "refit-down{bias=false}"]
    with pytest.raises(RequestError, match="fixes what --active says"):
        RECIPES["mixtral-8x2"].resolve(active=0.5)
    with pytest.raises(RequestError, match="a threshold is a bias"):
        parse_passes("fit-router{bias=false}")
