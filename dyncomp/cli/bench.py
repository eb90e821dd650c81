"""``dyncomp bench``."""

from __future__ import annotations

from pathlib import Path

import click

from dyncomp.cli import options


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prefill", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prompt that is timed.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--backend", type=click.Choice(["ort", "tvm"]), default="ort", show_default=True)
@options.device
@options.threads
@options.as_json
def command(bundle: Path, prefill: int, batch: int, backend: str, device: str, threads: int | None, json_: bool) -> None:
    """Tokens per second of BUNDLE beside its dense model: same runtime, same process, same threads, taking turns; medians."""
    from dyncomp.bundle import open_bundle
    from dyncomp.deploy import artifact_for, dense_artifacts, measure, require_device
    from dyncomp.examples import packaged_text
    from dyncomp.pipeline import parse_passes
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import bench_table, show
    from dyncomp.trace import trace_model

    require_device(device, bundle, backend)
    opened = open_bundle(bundle)
    artifact = artifact_for(opened, backend, device)
    loaded = opened.dense()
    with ProgressReporter() as progress:
        passes = parse_passes(", ".join(p.spec for p in opened.manifest.passes))
        graph = trace_model(loaded)
        text = packaged_text(loaded, graph)
        dense = dense_artifacts(graph, loaded.fingerprint, progress, passes=passes, backend=backend, device=device)
        entries = measure(
            [*dense, ("converted", artifact)], task=loaded.task, threads=threads, prefill_tokens=prefill, batch=batch, backend=backend,
            device=device, text=text,
        )  # fmt: skip
    if json_:
        options.print_json({"schema": 1, "model": loaded.name, "recipe": opened.manifest.recipe, "bench": entries})
    else:
        show(bench_table(entries))
