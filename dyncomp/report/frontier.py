"""What a search found out: which candidates no other beats in both loss and speed, and a picture of all that were timed."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48


def timed(trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The candidates whose loss and speed were both measured, by speed."""
    found = [t for t in trials if t["loss"] is not None and t["speed"] is not None and not t["quick"]]
    return sorted(found, key=lambda t: (t["speed"], -t["loss"]))


def frontier(trials: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the candidates beside which no other loses less and is faster, from the slowest to the fastest."""
    kept: list[dict[str, Any]] = []
    for trial in reversed(timed(trials)):
        if not kept or trial["loss"] < kept[-1]["loss"]:
            kept.append(trial)
    return [t["name"] for t in reversed(kept)]


def frontier_svg(search: dict[str, Any]) -> str:
    """Loss over speed: a point a candidate, the frontier a line, the chosen one filled. Empty with fewer than two points."""
    points = timed(search["trials"])
    if len(points) < 2:
        return ""
    best = frontier(search["trials"])
    x, y = _scale([t["speed"] for t in points], _MARGIN, _WIDTH - 3 * _MARGIN), _scale([t["loss"] for t in points], _HEIGHT - _MARGIN, 16)
    at = {t["name"]: (x(t["speed"]), y(t["loss"])) for t in points}
    line = " ".join(f"{at[name][0]:.1f},{at[name][1]:.1f}" for name in best)
    marks = "".join(_mark(t, *at[t["name"]], chosen=t["name"] == search["chosen"]) for t in points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<path d="M{_MARGIN} 8V{_HEIGHT - _MARGIN / 2:.0f}H{_WIDTH - 8}" fill="none" stroke="#888"/>'
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 6}">speed, x dense</text><text x="4" y="20">loss</text>'
        f'<polyline points="{line}" fill="none" stroke="#2b5fd9"/>{marks}</svg>'
    )


def _mark(trial: dict[str, Any], x: float, y: float, *, chosen: bool) -> str:
    label = f"{html.escape(trial['name'])}: {trial['loss']:+.2%}, {trial['speed']:.2f} x"
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="#2b5fd9" fill="{"#2b5fd9" if chosen else "#fff"}"/>'
    return f'{circle}<text x="{x + 9:.1f}" y="{y + 4:.1f}">{label}</text>'


def report_html(title: str, items: Sequence[RenderableType], search: dict[str, Any] | None) -> str:
    """The tables that a terminal shows, as a page, with the picture of the search if there was one."""
    console = Console(record=True, width=160, file=io.StringIO(), force_terminal=True)
    for item in items:
        console.print(item)
    shown = console.export_html(inline_styles=True, code_format='<pre style="font-family:monospace">{code}</pre>')
    plot = frontier_svg(search) if search is not None else ""
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>{plot}{shown}\n'


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Linear, from the smallest value to the largest."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
