"""docs/results.md, from the measurements that ``make bench`` took."""

from __future__ import annotations

from typing import Any


def results_markdown(results: dict[str, Any]) -> str:
    """Tables of conversions and of the routed FFN."""
    machine = results["machine"]
    lines = [
        "# Results",
        "",
        "Written by `make bench`; do not edit. Dense and converted models run in one process and take turns; medians; the machine is",
        "shared, so compare ratios. *Static* is pruning of the same number of FFN neurons for every token, refitted like the experts.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        "",
        "## Quality",
        "",
        "| command | text | dense | converted | static | active FFN | KL, nats | same next token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in results["conversions"]:
        for text, figures in report["quality"].items():
            lines.append(_quality_row(report["command"], text, figures))
    lines += [
        "",
        "## Cost and speed",
        "",
        "| command | active parameters | MFLOPs per token | decode, × dense | prefill, × dense | parity | minutes | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_cost_row(report) for report in results["conversions"]]
    if results["ffn"]:
        threads = results["ffn"][0]["threads"]
        lines += [
            "",
            f"## FFNs of SmolLM2-135M, one decode step, ONNX Runtime fp32, {threads} thread",
            "",
            "| FFNs | ms | × dense |",
            "|---|---|---|",
        ]
        lines += [f"| {row['ffn']} | {row['ms_per_step']:.2f} | {row['speedup']:.2f} |" for row in results["ffn"]]
    return "\n".join(lines) + "\n"


def _quality_row(command: str, text: str, figures: dict[str, Any]) -> str:
    active = f"{figures['active_ffn']:.1%}" if "active_ffn" in figures else ""
    if "cosine" in figures:
        cosine = figures["cosine"]
        cells = ["1", f"{cosine['converted']:.4f}", f"{cosine['static_pruned']:.4f}", active, "", ""]
        return f"| `{command}` | {text}, cosine | " + " | ".join(cells) + " |"
    perplexity, rise = figures["perplexity"], figures["increase"]
    cells = [f"{perplexity['dense']:.2f}"]
    cells += [f"{perplexity[m]:.2f} ({rise[m]:+.1%})" for m in ("converted", "static_pruned")]
    cells += [active, f"{figures['kl']['converted']:.3f}", f"{figures['agreement']['converted']:.1%}"]
    return f"| `{command}` | {text}, perplexity | " + " | ".join(cells) + " |"


def _cost_row(report: dict[str, Any]) -> str:
    dense = report["dense"]
    speed = {entry["variant"]: entry for entry in report.get("bench", [])}
    cells = [
        f"{report['active_parameters'] / 1e6:.1f} of {dense['active_parameters'] / 1e6:.1f} M",
        f"{report['flops_per_token'] / 1e6:.1f} of {dense['flops_per_token'] / 1e6:.1f}",
        _ratio(speed, "decode_tokens_per_s"),
        _ratio(speed, "prefill_tokens_per_s"),
        ", ".join(f"{p['relative_error']:.1e}" for p in report.get("parity", [])),
        f"{report['seconds'] / 60:.1f}",
        f"{report['peak_rss_bytes'] / 2**30:.2f}",
    ]
    return f"| `{report['command']}` | " + " | ".join(cells) + " |"


def _ratio(speed: dict[str, dict[str, Any]], key: str) -> str:
    if not speed or speed["dense"].get(key) is None:
        return ""
    return f"{speed['converted'][key] / speed['dense'][key]:.2f} ({speed['converted'][key]:.0f} / {speed['dense'][key]:.0f})"
