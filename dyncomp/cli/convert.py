"""``dyncomp convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dyncomp.cli import options


@click.command("convert")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option("--active", type=options.Fraction(), help="Mean fraction of active FFN neurons per token, as 75%. [default: the recipe's]")
@click.option("--experts", type=int, help="Experts per FFN; must divide its width. [default: the recipe's]")
@click.option("--quantize", metavar="PRECISION", help="Weights in int8 or int4 (GPTQ). [default: as the recipe says]")
@click.option("--recipe", help="A recipe by name (experts, experts-topk, static, dense) or a TOML file. [default: experts]")
@click.option("--calibrate", metavar="TEXT", help="Text to calibrate on: wikipedia, news, or a .txt/.jsonl file. [default: wikipedia]")
@click.option("--tokens", type=int, default=40_960, show_default=True, help="Calibration tokens.")
@click.option("--windows", type=int, default=16, show_default=True, help="Evaluation windows of each text.")
@click.option("--backend", default="ort", show_default=True, help="What to lower to: ort, or torch (the graph itself, no artifact).")
@click.option("--dump", type=click.Path(path_type=Path), help="Write the graph's text after each pass into this folder.")
@options.threads
@options.seed
@options.as_json
def command(json_: bool, **choices: Any) -> None:
    """Convert MODEL: carve its FFNs into experts, fit routers, refit, evaluate beside dense, lower, and write a bundle.

    Quality is measured on text held out from the calibration and on another source, beside the dense model and beside static
    pruning at the same cost. An interrupted run continues where it was.
    """
    from dyncomp.convert import ConvertRequest, convert
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import print_report

    request = ConvertRequest(**choices)
    with ProgressReporter() as progress:
        report = convert(request, progress=progress, say=progress.say)
    if json_:
        options.print_json(report)
    else:
        print_report(report, title=f"{request.out}")
