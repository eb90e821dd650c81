"""``dyncomp convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dyncomp.cli import options


@click.command("convert")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option("--max-loss", type=options.Fraction(), help="Search the fastest recipe that loses at most this. [default: 1%]")
@click.option("--speedup", type=float, help="Search the best recipe that is this many times as fast as the dense model.")
@click.option("--max-memory", type=options.Size(), help="Search among what takes at most this, as 100MB; alone, what loses least.")
@click.option("--minutes", type=float, help="The search begins no candidate after this time. [default: 15]")
@click.option("--trials", type=int, help="The search tries no more candidates than this.")
@click.option(
    "--recipe",
    help="No search: a recipe by name (experts, depth, static, mixtral-8x2, qwen-moe-64x8:upcycled, switch:carved …) or a TOML file.",
)
@click.option("--active", type=options.Fraction(), help="Mean fraction of active FFN neurons per token, as 75%. [default: the recipe's]")
@click.option("--experts", type=int, help="Experts per FFN; must divide its width. [default: the recipe's]")
@click.option(
    "--quantize", metavar="PRECISION", help="Weights in int8, int4 (AWQ, GPTQ), or mixed, by region. [default: as the recipe says]"
)
@click.option("--kv-cache", metavar="PRECISION", help="Keys and values of past tokens in int8, with a named recipe. [default: float]")
@click.option("--calibrate", metavar="TEXT|IMAGES|SOUND", help=options.CALIBRATE)
@click.option("--tokens", type=int, help=options.TOKENS)
@click.option("--windows", type=int, help=options.WINDOWS)
@click.option("--backend", default="ort", show_default=True, help="What to lower to: ort, tvm, or torch (the graph itself, no artifact).")
@click.option(
    "--low-memory/--no-low-memory",
    default=None,
    help="Keep weights in files, and one layer in memory at a time. [default: when they would not fit]",
)
@click.option("--dump", type=click.Path(path_type=Path), help="Write the graph's text after each pass into this folder.")
@options.threads
@options.seed
@options.as_json
def command(json_: bool, **choices: Any) -> None:
    """Convert MODEL: rewrite its graph, evaluate it beside the dense one, lower it, and write a bundle.

    Without a recipe, recipes are tried (precisions; experts; static pruning) and the fastest one within the loss limit is taken,
    by measured loss and measured speed. --max-memory limits the bytes of the artifact, its weights and tables (keys and values of past
    tokens come on top), and chooses a precision for each region where that fills them best. With --recipe, --active, --experts or
    --quantize that recipe is applied (the default of those is experts: carve, fit routers, refit).

    Presets are recipes with the experts of systems people know: mixtral-8x2, gpt4-16x2, qwen-moe-64x8, ds-moe, deepseek-v3, switch.
    NAME:carved makes them of each FFN's neurons, and a token computes a part of what it did; NAME:upcycled makes them copies of the FFN or
    of its parts, with a little noise, which begin as the dense model and are larger than it: they are for dyncomp heal. Without either,
    deepseek-v3 and switch are upcycled and the others carved. soft-moe (encoders) is upcycled only, and mod-12.5 skips layers.

    Pass options go into a recipe file, as passes = "skip-depth{active=87.5% kv=share gates=sequence}". Of tokens that skip an
    attention, kv=compute keeps keys and values, share reuses those of the attention before, absent hides them from later tokens;
    gates=threshold decides for each token, expert-choice among all of a sequence, sequence by its first tokens.

    --quantize mixed gives each region (FFN, projections, head) 4 or 8 bits by what 4 cost at the end of the model, 0.01 nats of KL
    divergence in all; in a recipe, quantize{mixed=4+8 mean=5.5} sets the mean bits a weight instead, scales included, and 32 among the
    choices leaves regions in float.

    --kv-cache int8 (in a recipe, quantize-cache) keeps keys and values as int8 codes with a scale for each token and head, about a
    quarter of the bytes; quality is that of the rounded ones. Only dyncomp's own kernels read them.

    Quality is measured on text, images or recordings held out from the calibration and on another source, beside the dense model and
    beside static pruning at the same cost. An interrupted run continues where it was.
    """
    from dyncomp.convert import DEFAULT_GOAL, ConvertRequest, convert
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import print_report
    from dyncomp.search import Goal

    limits = {name: choices.pop(name) for name in ("max_loss", "speedup", "max_memory", "minutes", "trials")}
    given = {name: value for name, value in limits.items() if value is not None}
    if given and not {"speedup", "max_memory"} & given.keys():
        given.setdefault("max_loss", DEFAULT_GOAL.max_loss)
    request = ConvertRequest(**choices, goal=Goal(**given) if given else None)
    with ProgressReporter() as progress:
        report = convert(request, progress=progress, say=progress.say)
    if json_:
        options.print_json(report)
    else:
        print_report(report, title=f"{request.out}")
