"""Options and parameter types that several commands share."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import click


class Fraction(click.ParamType):
    """``75%`` or ``0.75``; out-of-range values are left to the command, which knows what they mean."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            number = float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            self.fail(f"{value!r} is not a fraction such as 75% or 0.75", param, ctx)
        if not value.endswith("%") and number > 1:
            self.fail(f"{value!r} is more than 1; did you mean {value}%?", param, ctx)
        return number


class Size(click.ParamType):
    """``100MB``, ``1.5GB``, ``64MiB`` or bytes."""

    name = "size"
    UNITS: ClassVar = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        if found is None or found[1].count(".") > 1 or found[1] == "." or found[2].upper() not in self.UNITS:
            self.fail(f"{value!r} is not a size such as 100MB or 1.5GB", param, ctx)
        return round(float(found[1]) * self.UNITS[found[2].upper()])


threads = click.option("--threads", type=click.IntRange(min=1), help="Threads for latency figures and inference. [default: every core]")
device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="What ONNX Runtime computes on; a GPU takes the package onnxruntime-gpu.",
)
as_json = click.option("--json", "json_", is_flag=True, help="Print machine-readable results on standard output.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


CALIBRATE = (
    "What to calibrate on, a part of it held out: wikipedia, news, generated (a decoder writes it of "
    "itself: for when there is no text like what it will read), or a .txt/.jsonl file (for encoder–decoders also of "
    'pairs, {"source": …, "target": …} a line; else they read one half of a text and write the other); of models of images photos, '
    "digits, or a folder of images; of models of sound a .jsonl file of recordings, "
    '{"audio": "a.wav", "text": …} a line, a folder of a.wav beside a.txt, or a text, which eSpeak NG speaks. '
    "[default: wikipedia; photos]"
)
TOKENS = "Calibration tokens; an image or a recording is as many as the model makes of it. [default: 40960, or 96 recordings]"
WINDOWS = "Evaluation windows of each text, images, or recordings. [default: 16 windows, 256 images, 32 recordings]"
