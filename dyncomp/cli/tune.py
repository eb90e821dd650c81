"""``dyncomp tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dyncomp.cli import options


@click.command("tune")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Time for the search; 0 uses what is known.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that the kernels are tuned for. [default: every core]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the candidates.")
@click.option("--again", is_flag=True, help="Forget what was measured before for these shapes.")
@options.as_json
def command(json_: bool, **request: Any) -> None:
    """Search the parameters of the TVM kernels that BUNDLE's model calls: tiles, unrolling, panel width, parts of the depth and of the
    tokens.

    Each candidate is built, held against PyTorch, and timed in turns with two copies of the default, for one token and for a prompt of
    128; it is taken if it beats the default twice by more than the copies differ. What was tried is kept in the user's cache folder
    (tvm-tuning.json): the same command goes on where it was, and every model with the same shapes is lowered with what won. BUNDLE's
    own artifact is made again when something did.
    """
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import show, tuning_table
    from dyncomp.tune import TuneRequest, tune

    with ProgressReporter() as progress:
        report = tune(TuneRequest(**request), progress=progress, say=progress.say)
    if json_:
        options.print_json(report)
        return
    show(tuning_table(report))
    parity = f" (relative error {report['parity']['relative_error']:.1e})" if "parity" in report else ""
    click.echo(f"{request['bundle']}: the TVM artifact is {report['artifact']}{parity}; {report['seconds']:.0f} s")
