"""``dyncomp heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dyncomp.cli import options


@click.command("heal")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the healed bundle to write.")
@click.option(
    "--text",
    "--images",
    "--audio",
    "text",
    metavar="TEXT|IMAGES|SOUND",
    help="What to train on, as --calibrate takes it. [default: what is calibrated on, less what is held out]",
)
@click.option("--minutes", type=float, help="Time for training: as many steps as fit, found once by timing. [default: 10]")
@click.option("--steps", type=int, help="Optimiser steps, in place of a time: exactly repeatable.")
@click.option(
    "--budget",
    metavar="PERCENT",
    help="Operations of the layers that tokens skip, as 70%: part of the loss, and layers trade what they skip.",
)
@click.option(
    "--option", "choices", multiple=True, metavar="NAME=VALUE", help="Another option of the pass heal, as lr=1e-4; may be repeated."
)
@click.option("--calibrate", metavar="TEXT|IMAGES|SOUND", help=options.CALIBRATE)
@click.option("--tokens", type=int, help=options.TOKENS)
@click.option("--windows", type=int, help=options.WINDOWS)
@click.option("--backend", default="ort", show_default=True, help="What to lower to: ort, or torch (the graph itself, no artifact).")
@options.threads
@options.seed
@options.as_json
def command(
    bundle: Path, json_: bool, minutes: float | None, steps: int | None, budget: str | None, choices: tuple[str, ...], **request: Any
) -> None:
    """Train BUNDLE's model to give what its dense model gives (distillation), and write a new bundle with its evidence.

    Static pruning at the same cost, healed for as many steps on the same text, stands beside it. A quantized bundle is healed in
    float and quantized again. An interrupted run continues where its last checkpoint was. Under torchrun (torchrun --nproc-per-node 4 -m
    dyncomp heal …, on one or several machines that see the same folders) all processes share each step.
    """
    from dyncomp.bundle import open_bundle
    from dyncomp.convert import ConvertRequest, convert, healing_passes
    from dyncomp.heal.together import leading
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import print_report

    opened = open_bundle(bundle)
    given = [f"{name}={value}" for name, value in (("minutes", minutes), ("steps", steps), ("budget", budget)) if value is not None]
    passes = healing_passes(opened, " ".join([*given, *choices]))
    with leading() as first:
        if not first:
            return
        with ProgressReporter() as progress:
            source = opened.manifest.source.name
            report = convert(ConvertRequest(source, bundle=bundle, passes=passes, **request), progress=progress, say=progress.say)
    if json_:
        options.print_json(report)
    else:
        print_report(report, title=f"{request['out']}")
