"""Reports as tables in the terminal."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dyncomp.models.loaded import WRITES
from dyncomp.report.frontier import frontier

_VARIANTS = {
    "dense": "dense",
    "quantized": "dense, quantized alike",
    "before": "before",
    "converted": "converted",
    "static_pruned": "static pruning",
    "layers_dropped": "layers dropped",
}


def print_report(report: dict[str, Any], *, title: str) -> None:
    """Quality, cost and speed of a conversion, everything beside the dense model."""
    console = _console()
    console.print(f"\n{report['model']} -> {title}   recipe {report['recipe']}", style="bold")
    for spec in report.get("passes", []):
        console.print(f"  {spec}", markup=False)
    if "search" in report:
        console.print(search_table(report["search"], report["task"]))
    console.print(quality_table(report["quality"], report["task"]))
    console.print(cost_table(report))
    if report.get("bench"):
        console.print(bench_table(report["bench"]))
    for line in notes(report):
        console.print(line, markup=False)


def quality_table(quality: dict[str, dict[str, Any]], task: str) -> Table:
    """One row a model, a group of columns a text."""
    result = table("quality", "")
    causal = task in WRITES
    for text, figures in quality.items():
        size = f"{figures['windows']} x {figures['window_tokens']} tokens"
        result.add_column(f"{text}\n{size}\n{'perplexity' if causal else 'cosine to dense'}", justify="right")
        probes = ("linear probe", "dense's probe") if "probe" in figures else ()
        heard = ("word errors",) if "wer" in figures else ()
        for name in ("KL, nats", "same next token", *heard) if causal else ("same neighbours", *probes):
            result.add_column(f"\n\n{name}", justify="right")
    first = next(iter(quality.values()))
    for variant in [v for v in _VARIANTS if v in first.get("perplexity", first.get("cosine", {})) or v == "dense"]:
        cells = [_VARIANTS[variant]]
        for figures in quality.values():
            ranges = figures.get("intervals", {})

            def spread(figure: str, form: str, ranges: dict[str, Any] = ranges, variant: str = variant) -> str:
                return between(ranges.get(figure, {}).get(variant), form)

            if not causal:
                same = figures.get("retrieval", {}).get(variant)
                value = "1" if variant == "dense" else f"{figures['cosine'][variant]:.4f}{spread('cosine', '.4f')}"
                cells += [value, "" if same is None else f"{same:.1%}{spread('retrieval', '.1%')}"]
                if probe := figures.get("probe"):
                    change = "" if variant == "dense" else f" ({probe[variant] - probe['dense']:+.1%}{spread('probe_change', '+.1%')})"
                    kept = figures["probe_dense"].get(variant)
                    cells += [f"{probe[variant]:.1%}{change}", "" if kept is None else f"{kept:.1%}"]
                continue
            rise = "" if variant == "dense" else f" ({figures['increase'][variant]:+.1%}{spread('increase', '+.1%')})"
            cells.append(f"{figures['perplexity'][variant]:.2f}{rise}")
            if variant == "dense":
                cells += ["", ""]
            else:
                cells += [f"{figures['kl'][variant]:.3f}{spread('kl', '.3f')}", f"{figures['agreement'][variant]:.1%}"]
            if rates := figures.get("wer"):
                cells.append(_word_errors(rates, variant, spread))
        result.add_row(*cells)
    return result


def _word_errors(rates: dict[str, float], variant: str, spread: Callable[[str, str], str]) -> str:
    if variant not in rates:
        return ""
    if variant == "dense":
        return f"{rates[variant]:.1%}{spread('wer', '.1%')}"
    return f"{rates[variant]:.1%} ({rates[variant] - rates['dense']:+.1%}{spread('wer_change', '+.1%')})"


def between(ends: list[float] | None, form: str) -> str:
    """`` [low, high]``, or nothing where there is no interval."""
    return "" if ends is None else f" [{ends[0]:{form}}, {ends[1]:{form}}]"


def task_table(tasks: dict[str, dict[str, Any]]) -> Table:
    """Accuracy on questions: one row a task and model."""
    result = table("tasks", "task", ">questions", "", ">right", ">by length", ">against dense")
    for name, figures in tasks.items():
        ranges = figures["intervals"]
        for variant in [v for v in _VARIANTS if v in figures["accuracy"]]:
            cells = [f"{figures['accuracy'][variant]:.1%}{between(ranges.get('accuracy', {}).get(variant), '.1%')}"]
            normalised = figures.get("accuracy_normalised", {}).get(variant)
            cells.append("" if normalised is None else f"{normalised:.1%}")
            difference = figures["difference"].get(variant)
            if difference is None:
                cells.append("" if "chance" not in figures else f"chance is {figures['chance']:.1%}")
            else:
                cells.append(f"{difference:+.1%}{between(ranges.get('difference', {}).get(variant), '+.1%')}")
            result.add_row(name, str(figures["items"]), _VARIANTS[variant], *cells)
    return result


def router_table(rows: Iterable[dict[str, Any]], title: str, task: str) -> Table:
    """One row a router with its gates; see :class:`dyncomp.router_table.RouterRow`. A second line of the title names what collapsed."""
    loss = "perplexity" if task in WRITES else "1 - cosine"
    rows = list(rows)
    fallen = [f"{r['router']}, {r['gates']}" for r in rows if r["load"] and r["load"]["collapsed"]]
    title += f"\ncollapsed in some layer (next to the same experts for every token): {'; '.join(fallen)}" if fallen else ""
    columns = (">as the oracle", ">layer error", f">{loss}, refitted", ">active", ">experts used by", ">spread", ">never used", ">s")
    result = table(title, "router", "gates", *columns)
    form = "+.1%" if task in WRITES else ".4f"
    for row in rows:
        known = [
            "" if row["agreement"] is None else f"{row['agreement']:.1%}",
            "" if row["layer_error"] is None else f"{row['layer_error']:.4f}",
        ]
        value, load = f"{row['loss']:{form}}{between(row['interval'], form)}", row["load"]
        use = ["", "", ""]
        if load is not None:
            use = [f"{load['least_used']:.0%} to {load['most_used']:.0%}", f"{load['spread']:.2f}", f"{load['unused_experts']:.0f}"]
        result.add_row(row["router"], row["gates"] or "", *known, value, f"{row['active']:.1%}", *use, f"{row['seconds']:.0f}")
    return result


def search_table(search: dict[str, Any], task: str) -> Table:
    """The candidates that a search tried, in that order."""
    causal = task in WRITES
    speed = ">decode x dense" if causal else ">speed x dense"
    result = table(f"search: {search['goal']}", "candidate", ">loss", speed, *([">prefill x dense"] if causal else []), ">MB", ">s", "")
    best = frontier(search["trials"])
    for t in search["trials"]:
        ratios = [t["speed"], *([t["prefill"]] if causal else [])]
        cells = ["" if r is None else f"{r:.2f}" for r in ratios]
        slow = t["loss"] is None and t["bytes"] is None
        if slow:
            cells[0] = f"~{t['predicted']:.2f}"
        size = "" if t["bytes"] is None else f"{t['bytes'] / 1e6:.0f}"
        loss = "" if t["loss"] is None else f"{t['loss']:+.2%}"
        look = "slower, by the table of latencies" if slow else "too large" if not loss else "a quick look" if t["quick"] else ""
        mark = "<- chosen" if t["name"] == search["chosen"] else "on the frontier" if t["name"] in best else look
        result.add_row(t["name"], loss, *cells, size, f"{t['seconds']:.0f}", mark)
    return result


def cost_table(report: dict[str, Any]) -> Table:
    """Parameters and FLOPs per token or image, counted from the graph."""
    unit = report.get("flops_unit", "token")
    result = table("cost", "", ">parameters", ">active per token", f">MFLOPs per {unit}", ">active FFN neurons")
    dense = report["dense"]
    result.add_row(
        "dense", _millions(dense["parameters"]), _millions(dense["active_parameters"]), f"{dense['flops_per_token'] / 1e6:.1f}", "100.0%"
    )
    active = f"{report['active_ffn']:.1%}" if "active_ffn" in report else "100.0%"
    result.add_row(
        "converted",
        _millions(report["parameters"]),
        _millions(report["active_parameters"]),
        f"{report['flops_per_token'] / 1e6:.1f}",
        active,
    )
    return result


def bench_table(entries: Iterable[dict[str, Any]]) -> Table:
    """Tokens per second, with the ratio to the dense model of the same engine."""
    entries = list(entries)
    first = entries[0]
    prompt = f"prefill {first['prefill_tokens']} tokens/s"
    rates = {"images_per_s": "images/s"} if "images_per_s" in first else {"decode_tokens_per_s": "decode tokens/s"}
    if "decode_tokens_per_s" in rates:
        rates |= {"recordings_per_s": "recordings heard/s"} if "recordings_per_s" in first else {"prefill_tokens_per_s": prompt}
    columns = [column for label in rates.values() for column in (f">{label}", ">x dense")]
    result = table(f"speed, {first['threads']} threads, batch {first['batch']}", "engine", "variant", "precision", *columns)
    for entry in entries:
        dense = next((e for e in entries if e["engine"] == entry["engine"] and e["variant"] == "dense"), None)
        cells = []
        for key in rates:
            value = entry.get(key)
            cells.append("" if value is None else f"{value:.2f}" if key == "recordings_per_s" else f"{value:.1f}")
            cells.append("" if value is None or dense is None or not dense.get(key) else f"{value / dense[key]:.2f}")
        result.add_row(entry["engine"], entry["variant"], entry["precision"], *cells)
    return result


def kernels_table(kernels: dict[str, dict[str, int]]) -> Table:
    """What the kernels for a GPU take, as its compiler says; without one, the threads of a block."""
    keys = [key for key in ("threads", "registers", "shared_bytes", "spilled_bytes", "wide_loads") if key in next(iter(kernels.values()))]
    names = {"shared_bytes": "shared, bytes", "spilled_bytes": "spilled, bytes", "wide_loads": "16-byte loads"}
    result = table("kernels", "kernel", *(f">{names.get(key, key)}" for key in keys))
    for name, entry in kernels.items():
        result.add_row(name, *(str(entry[key]) for key in keys))
    return result


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader should know beside the tables."""
    lines = []
    for item in report.get("parity", []):
        equal = item.get("greedy_tokens_equal")
        tokens = f", greedy tokens equal {equal:.0%}" if equal is not None else ""
        most = f" (nine tokens of ten: {item['typical_error']:.1e})" if "typical_error" in item else ""
        error = f"relative error {item['relative_error']:.1e}{most}{tokens}"
        lines.append(f"parity {item['backend']} {item['precision']} with the PyTorch graph: {error}")
        lines += item.get("notes", [])
    first = next(iter(report["quality"].values()))
    if report.get("task") == "seq2seq":
        halves = "; of text, half of a window is read and the other half written"
        lines.append(f"perplexity: per written token, the right ones before it given{'' if 'wer' in first else halves}")
    increase, cosine = first.get("increase", {}), first.get("cosine", {})
    worse = increase and increase.get("static_pruned", 9e9) <= increase["converted"]
    worse = worse or (cosine and cosine.get("static_pruned", -1) >= cosine["converted"])
    if worse:
        lines.append("static pruning, which needs no routing, is as good here: prefer it (--recipe static)")
    if increase and increase.get("layers_dropped", 9e9) <= increase["converted"]:
        lines.append("dropping whole layers, which needs no router, is as good here")
    if "skipped" in first:
        lines.append(f"depth: tokens skip {first['skipped']:.1%} of the visits to layers (dyncomp inspect --depth)")
    lines += _plain_quantization_wins(report, increase)
    if mixed := report.get("precisions"):
        lines.append(describe_mix(mixed))
    if load := first.get("load"):
        lines.append(
            f"experts: used by {load['least_used']:.0%} to {load['most_used']:.0%} of the tokens; {load['unused_experts']:.0f} never; "
            f"tokens with no expert in some layer: {load['no_expert']:.1%}"
        )
        if load.get("collapsed"):
            lines.append(
                f"collapse: {load['collapsed']:.0f} routers choose next to the same experts for every token (dyncomp inspect --experts)"
            )
    if healing := report.get("healing"):
        before, after = healing["loss"]
        lines.append(
            f"healed: {healing['steps']} steps, {healing['tokens']} tokens, {healing['cpu_seconds'] / 60:.1f} CPU minutes; loss on "
            f"held-out windows {before:.4f} -> {after:.4f} (step {healing['best']}, thresholds set again)"
        )
    if "seconds" in report:
        lines.append(
            f"{report['seconds']:.0f} s ({report['cpu_seconds'] / 60:.1f} CPU minutes), "
            f"peak memory {report['peak_rss_bytes'] / 2**30:.2f} GiB"
        )
    return lines


def describe_mix(mixed: dict[str, Any]) -> str:
    """One line: what ``quantize{mixed}`` chose, and what it measured."""
    counts = collections.Counter(region["bits"] for region in mixed["regions"].values())
    parts = ", ".join(f"{'float32' if bits == 32 else f'int{bits}'} in {count} regions" for bits, count in sorted(counts.items()))
    return f"mixed precision: {mixed['mean_bits']:.2f} bits a weight, {parts}; loss on calibration windows {mixed['loss']:.4f}, rounded"


def tuning_table(report: dict[str, Any]) -> Table:
    """What a search of kernel parameters found: one row a shape."""
    threads = report["threads"]
    title = f"kernels, {threads} thread{'s' if threads > 1 else ''}"
    result = table(title, "kernel", "shape", ">calls", ">tried", ">failed", "parameters", ">x default", ">noise")
    for row in report["kernels"]:
        chosen = row["parameters"]
        result.add_row(
            row["kernel"],
            row["shape"],
            str(row["calls"]),
            f"{row['tried']} of {row['candidates']}",
            str(row["failed"]),
            "default kept" if chosen is None else " ".join(f"{k}={v}" for k, v in chosen.items()),
            ", ".join(f"{v:.2f} ({tokens} tokens)" if tokens != "1" else f"{v:.2f} (1 token)" for tokens, v in row["ratio"].items()),
            ", ".join(f"{v:.1%}" for v in row["noise"].values()),
        )
    return result


def _plain_quantization_wins(report: dict[str, Any], increase: dict[str, float]) -> list[str]:
    """A line when the dense model in the same precision is about as fast, and better."""
    speed = {(e["variant"], e["precision"]): e.get("decode_tokens_per_s") for e in report.get("bench", [])}
    converted = next(((p, s) for (v, p), s in speed.items() if v == "converted"), None)
    if converted is None or "quantized" not in increase:
        return []
    precision, rate = converted
    dense = speed.get(("dense", precision))
    if not rate or not dense or rate >= 1.1 * dense or increase["quantized"] > increase["converted"]:
        return []
    return [
        f"routing hardly pays here: the dense model in {precision} decodes at {dense / rate:.2f} x this speed and loses "
        f"{increase['quantized']:+.1%} instead of {increase['converted']:+.1%}: prefer --recipe dense --quantize {precision}"
    ]


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f} M"


def table(title: str, *columns: str) -> Table:
    """A plain table; a column whose name starts with ``>`` is aligned to the right."""
    result = Table(title=f"\n{title}", title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return result


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def show(*items: Table | Text | str) -> None:
    """Print tables and lines."""
    console = _console()
    for item in items:
        console.print(item, markup=False) if isinstance(item, str) else console.print(item)
