"""The model card of an export: what it is, how it was made, and what was measured."""

from __future__ import annotations

from typing import Any


def model_card(report: dict[str, Any], record: dict[str, Any]) -> str:
    """``README.md`` of an exported folder.

    Args:
        report: the bundle's. record: the export's (``dyncomp-export.json``).
    """
    lines = ["---", "tags: [dyncomp]"]
    if record["backend"] == "hf":
        lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["---", "", f"# {record['source']}, converted", ""]
    lines += [
        f"{record['source']}, rewritten by [dyncomp] {report['versions']['dyncomp']} with these passes, and exported from the result:",
        "",
    ]
    lines += [f"- `{spec}`" for spec in record["passes"]]
    lines += ["", "## This export", "", *_export(record), "", "## Quality and cost", ""]
    lines += ["Measured on the converted graph (`dyncomp convert`), not on this export.", "", *_quality(report), *_cost(report)]
    lines += ["", "The license is that of the model it was made from.", ""]
    return "\n".join(lines)


def _export(record: dict[str, Any]) -> list[str]:
    names = {"architecture": "architecture", "dtype": "weights", "temper": "tempered routers, p"}
    rows = [f"- {label}: {record[key]}" for key, label in names.items() if key in record]
    check = record.get("check", {})
    if "relative_error" in check:
        median = f" (median over positions {check['median_error']:.1e})" if "median_error" in check else ""
        rows.append(
            f"- logits beside the graph's: relative error {check['relative_error']:.1e}{median}, by {check.get('class', 'the artifact')}"
        )
    if "greedy_tokens" in check:
        rows.append(f"- greedy text: the first {check['greedy_equal']} of {check['greedy_tokens']} tokens are the graph's choice too")
    if check.get("ties"):
        rows.append(f"- at {check['ties']} of {check['positions']} positions experts score alike to the last digits: which run is rounding")
    if "temper" in record:
        rows.append("- router weights are scaled by 2^-p, so that the mixture's weights come out nearly equal; keep them out of float16")
    rows += [f"- {note}" for note in record.get("notes", [])]
    return rows


def _quality(report: dict[str, Any]) -> list[str]:
    perplexities = {name: figures["perplexity"] for name, figures in report.get("quality", {}).items() if "perplexity" in figures}
    if not perplexities:
        return []
    models = [name for name in next(iter(perplexities.values())) if name not in ("windows", "window_tokens")]
    rows = ["| perplexity | " + " | ".join(m.replace("_", " ") for m in models) + " |", "|---" * (len(models) + 1) + "|"]
    rows += [f"| {text} | " + " | ".join(f"{values[m]:.2f}" for m in models) + " |" for text, values in perplexities.items()]
    return [*rows, ""]


def _cost(report: dict[str, Any]) -> list[str]:
    rows = []
    if "active_ffn" in report:
        rows.append(f"- active FFN neurons: {report['active_ffn']:.1%} of all, mean over tokens")
    if "parameters" in report:
        rows.append(f"- parameters: {report['parameters'] / 1e6:.1f} M, active {report['active_parameters'] / 1e6:.1f} M "
                    f"(dense {report['dense']['parameters'] / 1e6:.1f} M)")  # fmt: skip
    return rows
