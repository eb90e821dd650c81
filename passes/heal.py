"""Pass ``heal``: train a converted model to give what the dense one gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.recalibrate import Recalibrate

from dyncomp.calibrate import UNFITTED, Calibration
from dyncomp.errors import RequestError
from dyncomp.evaluate import model_inputs
from dyncomp.examples import row_tokens
from dyncomp.graph import Graph
from dyncomp.heal import Settings, Trainer
from dyncomp.heal.budget import settle
from dyncomp.heal.held_out import HeldOut, pieces
from dyncomp.heal.program import Program
from dyncomp.heal.ranks import world
from dyncomp.heal.together import share
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.thresholds import find_thresholds
from dyncomp.rows import Rows, split_rows


@dataclass(frozen=True)
class Heal(Settings, Pass):
    """Distillation (Hinton et al., 1503.02531) from the graph before any pass, on text; the program stays what it is.

    The KL divergence of next-token distributions (encoders: the squared error of the last states) is minimised over weights of
    linear layers and experts, routers (straight-through), norms and biases. Windows of documents at the end of the text, on which
    nothing is trained, choose the best state. If there was a better one, thresholds are then set again on those and others of these
    documents, so that the active fraction is what it was calibrated to; ``loss`` in the facts is that of the windows that chose, before
    everything and with the new thresholds.

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
        held_out, windows = (min(max(FEWEST, -(-n // row_tokens(graph, ctx.text))), len(ctx.text) // 4) for n in (CHOOSING, UNFITTED))
        if held_out == 0:
            raise RequestError(f"heal: {len(ctx.text)} windows of text are too few: at least 4 are needed", hint="give more text")
        train, apart = set_apart(ctx.text, windows, ctx.seed)
        chosen_by = apart[-held_out:]
        unseen = _calibration(graph, chosen_by)
        if self.budget:
            settle(graph, unseen.batches, self.budget)
        share(graph, ctx.dense, train, chosen_by, self, ctx.seed, ctx.folder)
        trainer = Trainer(graph, ctx.dense, train, chosen_by, self, seed=ctx.seed, folder=ctx.folder, progress=ctx.progress)
        held = trainer.unseen if world() == 1 else HeldOut(trainer.teacher, pieces(graph, chosen_by), trainer.task)
        before = held.total(Program(graph, bfloat16=self.half)) / held_out
        healed = trainer.run()
        del trainer
        if self.budget:
            settle(graph, unseen.batches, self.budget)
        if find_thresholds(graph) and (healed.best or self.budget):
            Recalibrate().run(graph, dataclasses.replace(ctx, calibration=_calibration(graph, apart)))
        after = held.total(Program(graph, bfloat16=self.half)) / held_out
        facts = {
            "steps": healed.steps, "best": healed.best, "tokens": healed.tokens, "windows": len(train), "held_out_windows": windows,
            "loss": [before, after], "curve": healed.curve, "seconds": healed.seconds, "cpu_seconds": healed.cpu_seconds,
        }  # fmt: skip
        return PassResult(changed=healed.changed, facts=facts)


def set_apart(text: Rows, count: int, seed: int = 0) -> tuple[Rows, Rows]:
    """(what is trained on, ``count`` windows of the documents behind it).

    A text comes document by document, and a model that has seen a part of one is better on the rest and opens other gates there: what is
    not trained on is left out in one piece, :data:`APART` of the text, and the windows drawn from all of it.
    """
    piece = max(count, round(APART * len(text)))
    chosen = torch.randperm(piece, generator=torch.Generator().manual_seed(seed))[:count] + len(text) - piece
    return text[:-piece], text[chosen.tolist()]


def _calibration(graph: Graph, rows: Rows) -> Calibration:
    return Calibration([model_inputs(graph, row) for row in split_rows(rows, 1)], "held out")


APART = 0.15
"""Of a text, its end: what may be held out of a training."""
FEWEST, CHOOSING = 4, 4_096
"""Windows, and tokens in all, that choose the best state at least; thresholds are set on these and as many more as hold
:data:`~dyncomp.calibrate.UNFITTED` tokens."""
