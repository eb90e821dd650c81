"""Pass ``heal``: train a converted model to give what the dense one gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.recalibrate import Recalibrate

from dyncomp.calibrate import UNFITTED, UNFITTED_SKIPS, Calibration
from dyncomp.errors import RequestError
from dyncomp.evaluate import model_inputs
from dyncomp.examples import row_tokens
from dyncomp.graph import Graph
from dyncomp.heal import Settings, Trainer
from dyncomp.heal.budget import settle
from dyncomp.heal.held_out import HeldOut, pieces
from dyncomp.heal.program import Program
from dyncomp.heal.together import share
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.depth import find_skips
from dyncomp.regions.thresholds import find_thresholds
from dyncomp.rows import Rows, split_rows
from dyncomp.sweep import has_bfloat16


@dataclass(frozen=True)
class Heal(Settings, Pass):
    """Distillation (Hinton et al., 1503.02531) from the graph before any pass, on text; the program stays what it is.

    The KL divergence of next-token distributions (encoders: the squared error of the last states) is minimised over weights of
    linear layers and experts, routers (straight-through), norms and biases. Windows drawn from the whole text choose the best state.
    Afterwards thresholds are set again on those and others that were kept apart, so that the active fraction is what it was calibrated to;
    ``loss`` in the facts is that of the windows that chose, before everything and with the new thresholds.

    before:  dyncomp.routed_ffn(x, threshold_gates(linear(x, R, b)), w_up, w_down)
    after:   dyncomp.routed_ffn(x, threshold_gates(linear(x, R', b')), w_up', w_down')
    """

    name: ClassVar[str] = "heal"
    reads_text: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        if graph.quantized:
            raise RequestError("heal: the weights are quantized, and codes cannot be trained", hint="put heal before quantize")
        if ctx.dense is None or graph.inputs != ctx.dense.inputs:
            raise RequestError("heal: there is no dense model to learn from, or it takes other inputs")
        if ctx.text is None:
            raise RequestError("heal needs text to train on", hint="give one (--text FILE)")
        tokens = UNFITTED_SKIPS if find_skips(graph) else UNFITTED
        held_out, windows = (min(max(HELD_OUT, -(-n // row_tokens(graph, ctx.text))), len(ctx.text) // 4) for n in (UNFITTED, tokens))
        if held_out == 0:
            raise RequestError(f"heal: {len(ctx.text)} windows of text are too few: at least 4 are needed", hint="give more text")
        train, apart = set_apart(ctx.text, windows, ctx.seed)
        chosen_by = apart[-held_out:]
        unseen = _calibration(graph, chosen_by)
        if self.budget:
            settle(graph, unseen.batches, self.budget)
        share(graph, ctx.dense, train, chosen_by, self, ctx.seed, ctx.folder)
        half = self.bfloat16 and has_bfloat16()
        held = HeldOut(Program(ctx.dense, bfloat16=half), pieces(graph, chosen_by), str(graph.info.get("task", "causal-lm")))
        before = held.total(Program(graph, bfloat16=half)) / held_out
        trainer = Trainer(graph, ctx.dense, train, chosen_by, self, seed=ctx.seed, folder=ctx.folder, progress=ctx.progress)
        healed = trainer.run()
        del trainer
        if self.budget:
            settle(graph, unseen.batches, self.budget)
        if find_thresholds(graph):
            Recalibrate(tokens=tokens).run(graph, dataclasses.replace(ctx, calibration=_calibration(graph, apart)))
        after = held.total(Program(graph, bfloat16=half)) / held_out
        facts = {
            "steps": healed.steps, "best": healed.best, "tokens": healed.tokens, "windows": len(train), "held_out_windows": windows,
            "loss": [before, after], "curve": healed.curve, "seconds": healed.seconds, "cpu_seconds": healed.cpu_seconds,
        }  # fmt: skip
        return PassResult(changed=healed.changed, facts=facts)


def set_apart(text: Rows, count: int, seed: int = 0) -> tuple[Rows, Rows]:
    """(what is trained on, ``count`` windows that are not), drawn from everywhere: a text comes document by document."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed)).tolist()
    return text[order[:-count]], text[order[-count:]]


def _calibration(graph: Graph, rows: Rows) -> Calibration:
    return Calibration([model_inputs(graph, row) for row in split_rows(rows, 1)], "held out")


HELD_OUT = 4
"""The fewest windows that choose the best state and set the thresholds, with at least :data:`UNFITTED` tokens in all; nothing is trained on
them, nor on the further ones that set thresholds of layers which tokens skip."""
