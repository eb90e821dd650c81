"""``dyncomp export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dyncomp.cli import options


@click.command("export")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--backend",
    default="hf",
    show_default=True,
    help="hf (a checkpoint that stock classes load), gguf (llama.cpp), ort (ONNX), genai (ONNX for onnxruntime-genai), "
    "tvm (a compiled library) or pt2.",
)
@click.option("--architecture", default="auto", show_default=True, help="Of the checkpoint; auto is the first that can hold the model.")
@click.option("--dtype", default="float32", show_default=True, help="Of the checkpoint's weights: float32 or bfloat16.")
@click.option(
    "--temper",
    type=int,
    help="p of tempered routers, for models whose gates are 1: 10 to 14, or 22 for Granite in transformers alone. "
    "[default: what suits the architecture]",
)
@click.option(
    "--target",
    help="What --backend tvm compiles for: x86-64, x86-64-v3, x86-64-v4, aarch64, cuda-sm_80, cuda-sm_90. "
    "Another architecture takes a cross compiler (pip install 'dyncomp[cross]'), PTX and cubin take nvcc (pip install 'dyncomp[cuda]'). "
    "[default: this machine]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="What --backend ort writes a graph for; of a GPU only operators that ONNX Runtime has there. No GPU is needed.",
)
@click.option("--explain", is_flag=True, help="Write nothing; say for each architecture what it cannot express.")
@options.as_json
def command(bundle: Path, out: Path | None, explain: bool, json_: bool, **choices: Any) -> None:
    """Write BUNDLE's model in a form that other programs run, and hold it against the graph.

    A checkpoint needs routers that choose the same number of experts for every token, without biases where the architecture has none, and
    gates as its class computes them: the recipes granite-moe and qwen-moe make such models.
    """
    from dyncomp.errors import RequestError
    from dyncomp.export import ExportRequest, export
    from dyncomp.export import explain as reasons

    if explain:
        found = reasons(bundle)
        if json_:
            options.print_json(found)
            return
        for name, why in found.items():
            click.echo(f"{name}: " + ("; ".join(why) if why else "can hold it"))
        return
    if out is None:
        raise RequestError("there is nowhere to write to", hint="give a folder with -o")
    record = export(ExportRequest(bundle, out, **choices))
    if json_:
        options.print_json(record)
        return
    what = " ".join(str(record[key]) for key in ("architecture", "dtype", "target", "device") if record.get(key))
    click.echo(f"{out}: {record['backend']} {what}".rstrip())
    for note in record.get("notes", []):
        click.echo(f"  note: {note}")
    if str(record.get("target")).startswith("cuda"):
        from dyncomp.report.tables import kernels_table, show

        show(kernels_table(record["kernels"]))
    for key, value in record.get("check", {}).items():
        click.echo(f"  {key.replace('_', ' ')}: {f'{value:.1e}' if isinstance(value, float) else value}")
