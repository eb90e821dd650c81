"""docs/results.md, from the measurements that ``make bench`` took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dyncomp.report.tables import between

_BESIDE = ("converted", "quantized", "static_pruned")


def results_markdown(results: dict[str, Any]) -> str:
    """Tables of conversions and of the routed FFN."""
    machine = results["machine"]
    vector = ", ".join(machine["vector"]) or machine["architecture"]
    lines = [
        "# Results",
        "",
        "Written by `make bench`; do not edit. Dense and converted models run in one process and take turns; medians; the machine is",
        "shared, so compare ratios. *Static* is pruning of the same number of FFN neurons for every token, refitted like the experts.",
        "",
        f"{machine['cpu']} ({vector}), {machine['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        "",
        "## Quality",
        "",
        "| command | text | dense | converted | dense, quantized alike | static | active FFN | KL, nats | same next token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in results["conversions"]:
        for text, figures in report["quality"].items():
            lines.append(_quality_row(report["command"], text, figures))
    lines += [
        "",
        "## Cost and speed",
        "",
        "Speed is beside the dense model in fp32 and, where the converted one is quantized, beside the dense model quantized alike.",
        "",
        "| command | active parameters | MFLOPs per token | decode, × dense | prefill, × dense | parity | minutes | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_cost_row(report) for report in results["conversions"]]
    if results["ffn"]:
        threads = results["ffn"][0]["threads"]
        lines += ["", f"## FFNs, {threads} thread, × the dense FFN of the same precision", ""]
        lines += _table(FFN, map(ffn_cells, results["ffn"]))
    for threads, rows in _by_threads(results.get("peers", [])).items():
        lines += ["", f"## SmolLM2-135M beside other engines, {threads} thread{'s' * (threads > 1)}, batch 1", ""]
        lines += _table(peer_columns(rows[0]["prefill_tokens"]), [peer_cells(row, rows[0]) for row in rows])
    if results.get("gains"):
        lines += [
            "",
            "## How the gain splits",
            "",
            "Decoding beside the best other engine in fp32, in factors that multiply to *all*: fewer bits alone (the best of the others,",
            "one over the other), kernels alone (our dense model over the best of the others in those bits), what is skipped alone (the",
            "converted model over our dense one in those bits).",
            "",
            *_table(GAINS, map(gain_cells, results["gains"])),
        ]
    if results.get("serving"):
        lines += [
            "",
            "## Serving SmolLM2-135M dense",
            "",
            "Requests at a time through `Batcher`, tokens a second of decoding. Python's share is what a step of `Generator.stream` takes",
            "beyond the runtime's call, in % of that call. Prompt lookup, and a draft by int4 with a screened head, are × decoding",
            "without, with the tokens that a pass gives; the text is the same.",
            "",
            *_table(SERVING, map(serving_cells, results["serving"])),
        ]
    return "\n".join(lines) + "\n"


FFN = "model", "backend", "precision", "FFNs", ">decode step, ms", ">×", ">prefill of 128, ms", ">×"


def ffn_cells(row: dict[str, Any]) -> list[str]:
    """One row of :data:`FFN`, of ``bench.ffn``."""
    times = f"{row['ms_per_step']:.2f}", f"{row['speedup']:.2f}", f"{row['ms_per_prefill']:.2f}", f"{row['prefill_speedup']:.2f}"
    return [row["shape"], row["backend"], row["precision"], row["ffn"], *times]


GAINS = "converted", "engine", "precision", "threads", ">bits", ">kernels", ">skipping", ">all", ">× best int8 peer"


def gain_cells(gain: dict[str, Any]) -> list[str]:
    """One row of :data:`GAINS`, of ``bench.peers.gains``."""
    factors = [gain.get(name) for name in ("bits", "kernels", "skipping", "all", "of_int8")]
    precision = gain["precision"].partition(",")[0]
    return [gain["bundle"], gain["engine"], precision, str(gain["threads"]), *("" if x is None else f"{x:.2f}" for x in factors)]


def peer_columns(prefill: int) -> list[str]:
    """Of a table of engines; ``>`` for numbers."""
    return ["engine", "precision", ">decode tokens/s", ">×", ">× best peer", f">prefill {prefill}", ">×", ">× best peer"]


def peer_cells(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """A row of it: rates, over those of the first row, and over those of the best peer with weights in as many bits."""
    cells = [row["engine"], row["precision"]]
    for what, digits in (("decode", 1), ("prefill", 0)):
        rate, peer = row[f"{what}_tokens_per_s"], row[f"{what}_x_peer"]
        cells += [f"{rate:.{digits}f}", f"{rate / first[f'{what}_tokens_per_s']:.2f}", "" if peer is None else f"{peer:.2f}"]
    return cells


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; columns may begin with ``>``, as those of the terminal's tables do."""
    head = [name.removeprefix(">") for name in columns]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _by_threads(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["threads"], []).append(row)
    return found


SERVING = (
    "precision", "threads", "one request", "together", "×", "× with prompts", "step, ms", "Python's share", "load, s", "memory, × file",
    "prompt lookup", "drafted by int4",
)  # fmt: skip


def serving_cells(row: dict[str, Any]) -> list[str]:
    """What ``bench.serving`` measured in one precision, under the heads :data:`SERVING`."""
    loading = row["loading"]
    return [
        row["precision"],
        f"{row['threads']}",
        f"{row['one_tokens_per_s']:.1f}",
        f"{row['tokens_per_s']:.1f} ({row['requests']} requests)",
        f"{row['ratio']:.2f}",
        f"{row['whole_ratio']:.2f}",
        f"{row['step_seconds'] * 1e3:.2f}",
        ", ".join(f"{way} {share:.1%}" for way, share in row["overhead"].items()),
        f"{loading['seconds']:.2f}",
        f"{loading['loaded_mib'] / loading['file_mib']:.2f}; {loading['run_mib'] / loading['file_mib']:.2f} after a run",
        *(
            ", ".join(f"{kind} {found['speed']:.2f} ({found['tokens_a_pass']:.2f})" for kind, found in row[way].items())
            for way in ("lookup", "drafted")
        ),
    ]


def _quality_row(command: str, text: str, figures: dict[str, Any]) -> str:
    active = f"{figures['active_ffn']:.1%}" if "active_ffn" in figures else ""

    def spread(figure: str, model: str, form: str) -> str:
        return between(figures.get("intervals", {}).get(figure, {}).get(model), form)

    if "cosine" in figures:
        cosine = figures["cosine"]
        cells = ["1", *(f"{cosine[m]:.4f}{spread('cosine', m, '.4f')}" if m in cosine else "" for m in _BESIDE), active, "", ""]
        return f"| `{command}` | {text}, cosine | " + " | ".join(cells) + " |"
    perplexity, rise = figures["perplexity"], figures["increase"]
    cells = [f"{perplexity['dense']:.2f}"]
    cells += [f"{perplexity[m]:.2f} ({rise[m]:+.1%}{spread('increase', m, '+.1%')})" if m in rise else "" for m in _BESIDE]
    cells += [active, f"{figures['kl']['converted']:.3f}", f"{figures['agreement']['converted']:.1%}"]
    return f"| `{command}` | {text}, perplexity | " + " | ".join(cells) + " |"


def _cost_row(report: dict[str, Any]) -> str:
    dense = report["dense"]
    cells = [
        f"{report['active_parameters'] / 1e6:.1f} of {dense['active_parameters'] / 1e6:.1f} M",
        f"{report['flops_per_token'] / 1e6:.1f} of {dense['flops_per_token'] / 1e6:.1f}",
        _ratios(report.get("bench", []), "decode_tokens_per_s"),
        _ratios(report.get("bench", []), "prefill_tokens_per_s"),
        ", ".join(f"{p['relative_error']:.1e}" for p in report.get("parity", [])),
        f"{report['seconds'] / 60:.1f}",
        f"{report['peak_rss_bytes'] / 2**30:.2f}",
    ]
    return f"| `{report['command']}` | " + " | ".join(cells) + " |"


def _ratios(entries: list[dict[str, Any]], key: str) -> str:
    """The converted model's rate beside each dense one's: ``2.31 of fp32, 1.10 of int8``."""
    converted = next((e[key] for e in entries if e["variant"] == "converted"), None)
    if converted is None:
        return ""
    return ", ".join(f"{converted / e[key]:.2f} of {e['precision']}" for e in entries if e["variant"] == "dense" and e[key])
