"""``dyncomp evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from dyncomp.cli import options


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--text", "--images", "--audio", "sources", multiple=True, metavar="TEXT|IMAGES|SOUND",
    help="What to evaluate on: wikipedia, news, or a file (of encoder–decoders also pairs, see convert); of models of images photos, "
    "digits, or a folder of images, in sub-folders by what they show for linear probes; of models of sound "
    "recordings, or a text to be spoken (see convert); may be repeated. [default: news; digits]",
)  # fmt: skip
@click.option(
    "--windows", type=click.IntRange(min=1), help="At most this many windows, images or recordings of each. [default: 16; 256; 32]"
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME|FILE",
    help="Questions: topics, or a .jsonl file of multiple-choice or exact-match questions; may be repeated.",
)
@click.option("--items", type=click.IntRange(min=1), default=200, show_default=True, help="At most this many questions of each task.")
@click.option("--baselines", is_flag=True, help="Also the dense model quantized alike, and static pruning at equal cost (takes minutes).")
@options.seed
@options.as_json
def command(
    bundle: Path, sources: tuple[str, ...], windows: int | None, tasks: tuple[str, ...], items: int, baselines: bool, seed: int, json_: bool
) -> None:
    """Quality of BUNDLE beside its dense model, on the same windows of any text, the same images or recordings, and on
    questions with known answers. Of recordings also the word error rate of what is written, compared in lower case and without
    punctuation.

    Intervals are of 95 %, by bootstrap over windows, images, recordings or questions, paired with the dense model.
    The dense model is loaded again from where the bundle says it came from, and must be the same one.
    """
    from dyncomp.bundle import open_bundle
    from dyncomp.evidence import evaluate_bundle
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import quality_table, task_table

    opened = open_bundle(bundle)
    with ProgressReporter() as progress:
        quality, answers = evaluate_bundle(
            opened, sources, count=windows, tasks=tasks, items=items, plain=baselines, seed=seed, progress=progress
        )
    if json_:
        options.print_json(
            {"schema": 1, "model": opened.manifest.source.name, "recipe": opened.manifest.recipe, "quality": quality, "tasks": answers}
        )
        return
    from dyncomp.report.tables import show

    show(quality_table(quality, opened.manifest.source.task), *([task_table(answers)] if answers else []))
