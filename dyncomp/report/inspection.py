"""What ``dyncomp inspect`` shows, as tables and as plain data."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from dyncomp.bundle import Bundle
from dyncomp.cost import count, flops_unit
from dyncomp.graph import Graph
from dyncomp.regions import Regions, find_routed
from dyncomp.report.tables import describe_mix, quality_table, search_table, table


def regions_as_dict(graph: Graph, regions: Regions) -> dict[str, Any]:
    """Every region with its shapes and counts."""
    cost = count(graph, regions=regions)
    return {
        "model": graph.info.get("name"),
        "task": graph.info.get("task"),
        "parameters": cost.parameters,
        "flops_per_token": cost.flops_per_token,
        "flops_unit": flops_unit(graph),
        "ffns": [
            {
                "name": f.name, "activation": f.activation, "gated": f.gated, "layout": f.layout, "d_model": f.d_model, "d_ff": f.d_ff,
                "bias": f.down.bias is not None, "parameters": f.parameters, "flops_per_token": f.flops_per_token,
                "shared_weights": f.shared_weights,
            }
            for f in regions.ffns
        ],
        "attentions": [
            {
                "name": a.path, "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "mask": str(a.mask),
                "rotary": a.rotary[0] is not None,
            }
            for a in regions.attentions
        ],
        "blocks": [{"name": b.name, "kind": b.kind} for b in regions.blocks],
        "head": None if regions.head is None else {"weight": regions.head.weight, "tied": regions.head.tied, "vocab": regions.head.vocab},
        "refusals": [asdict(r) for r in regions.refusals],
    }  # fmt: skip


def regions_tables(graph: Graph, regions: Regions) -> list[Table | str]:
    """The same for people; equal neighbours share a row."""
    facts = regions_as_dict(graph, regions)
    inputs = ", ".join(map(str, graph.inputs))
    size = f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['flops_per_token'] / 1e6:.1f} MFLOPs per {facts['flops_unit']}"
    items: list[Table | str] = [
        f"{facts['model']}: {facts['task']}, {size}",
        f"graph: {len(graph.nodes)} nodes, ({inputs}) -> ({', '.join(graph.outputs)})",
    ]
    ffns: list[tuple[tuple[str, ...], str]] = [
        (
            (
                f"{'gated ' if f['gated'] else ''}{f['activation']}", f["layout"], f"{f['d_model']} -> {f['d_ff']}",
                "yes" if f["bias"] else "no", f"{f['parameters'] / 1e6:.2f} M", f"{f['flops_per_token'] / 1e6:.2f} M",
                "shared weights" if f["shared_weights"] else "",
            ),
            f["name"],
        )
        for f in facts["ffns"]
    ]  # fmt: skip
    items.append(_grouped("FFNs", ("activation", "layout", "width", "bias", "parameters", "FLOPs/token", "note"), ffns))
    attentions: list[tuple[tuple[str, ...], str]] = [
        ((f"{a['heads']}", f"{a['kv_heads']}", f"{a['head_dim']}", a["mask"], "yes" if a["rotary"] else "no"), a["name"])
        for a in facts["attentions"]
    ]
    items.append(_grouped("attentions", ("heads", "KV heads", "head dim", "mask", "rotary"), attentions))
    if facts["head"]:
        tied = ", tied to the embedding" if facts["head"]["tied"] else ""
        items.append(f"head: {facts['head']['weight']}, {facts['head']['vocab']} tokens{tied}")
    return items + _refusals(facts["refusals"])


def bundle_as_dict(opened: Bundle) -> dict[str, Any]:
    """The manifest (without checksums) and the report."""
    return opened.manifest.model_dump(exclude={"files"}) | {"report": opened.report()}


def bundle_tables(opened: Bundle) -> list[Table | str]:
    """What was rewritten, where, with what quality, and what was refused and why."""
    manifest, report = opened.manifest, opened.report()
    items: list[Table | str] = [
        f"{opened.path}: {manifest.source.name} ({manifest.source.kind}, {manifest.source.task}), "
        f"recipe {manifest.recipe}, dyncomp {manifest.dyncomp}",
    ]
    passes = table("passes", "pass", ">regions", ">error", ">s", "refused")
    for entry in manifest.passes:
        error = "" if entry.relative_error is None else f"{entry.relative_error:.1e}"
        passes.add_row(entry.spec, str(len(entry.changed)), error, f"{entry.seconds:.0f}", str(len(entry.refused) or ""))
    items.append(passes)
    if "search" in report:
        items.append(search_table(report["search"], manifest.source.task))
    graph = opened.graph()
    active = next(iter(report["quality"].values())).get("active_by_region", {})
    rows = table("routed FFNs", "where", ">experts", ">neurons each", "activation", ">active, held out", "router")
    for region in find_routed(graph):
        router = " -> ".join(_op(n) for n in region.router)
        share = f"{active[region.name]:.1%}" if region.name in active else ""
        rows.add_row(region.name, str(region.experts), str(region.d_ff // region.experts), region.activation, share, router)
    if rows.row_count:
        items.append(rows)
    if graph.quantized:
        items.append(_quantized_table(graph))
    for name, margin in graph.info.get("screened", {}).items():
        items.append(f"{name}: the lower halves of its codes are read where a logit comes within {margin:g} nats of the largest")
    if mixed := graph.info.get("precisions"):
        items += [_precisions_table(mixed), describe_mix(mixed)]
    kept = [name for entry in manifest.passes for name in entry.facts.get("kept_dense", [])]
    if kept:
        items.append(f"kept dense: {', '.join(kept)}")
    items.append(quality_table(report["quality"], manifest.source.task))
    for entry in report.get("parity", []):
        items += _placement(entry)
    return items + _refusals([*manifest.refusals, *(r for entry in manifest.passes for r in entry.refused)])


def _placement(entry: dict[str, Any]) -> list[Table | str]:
    """What runs where in an artifact; nothing of a bundle that an earlier dyncomp wrote."""
    rows = table(f"placement: {entry['backend']}", "provider", ">nodes", "operators")
    for provider, nodes in entry.get("placement", {}).items():
        rows.add_row(provider, str(sum(nodes.values())), ", ".join(f"{name} {count}" for name, count in sorted(nodes.items())))
    return [*([rows] if rows.row_count else []), *entry.get("notes", [])]


def _quantized_table(graph: Graph) -> Table:
    """Quantized weights by format, the rest last."""
    formats = {name: q.format for name, q in graph.quantized.items()}
    rows: dict[tuple[int, int, bool] | None, list[str]] = {}
    seen: set[int] = set()
    for name, value in graph.constants().items():
        if isinstance(value, torch.nn.Parameter) and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            rows.setdefault(formats.get(name), []).append(name)
    result = table("weights", "precision", "block", "offsets", ">tensors", ">MB", "where")
    for form, names in sorted(rows.items(), key=lambda item: item[0] or (99, 0, False)):
        cells = ("float32", "", "") if form is None else (f"int{form[0]}", str(form[1]), "no" if form[2] else "yes")
        size = sum(graph.quantized[n].bytes if n in graph.quantized else 4 * graph.tensor(n).numel() for n in names)
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        result.add_row(*cells, str(len(names)), f"{size / 1e6:.1f}", where)
    return result


def _precisions_table(mixed: dict[str, Any]) -> Table:
    """Regions by what they would lose in the fewest bits for each million weights, the most sensitive first; where many in a row got the
    same, one line for all."""
    bits = sorted({int(b) for region in mixed["regions"].values() for b in region["loss"]})
    result = table("precision by sensitivity", "precision", ">regions", ">M weights", *(f">loss in {_bits(b)}" for b in bits), "where")

    def sensitivity(item: tuple[str, dict[str, Any]]) -> float:
        return float(item[1]["loss"][str(bits[0])] / item[1]["weights"])

    ordered = sorted(mixed["regions"].items(), key=sensitivity, reverse=True)
    for chosen, group in itertools.groupby(ordered, key=lambda item: item[1]["bits"]):
        names, regions = zip(*group, strict=True)
        losses = (f"{sum(region['loss'][str(b)] for region in regions):.1e}" for b in bits)
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        result.add_row(_bits(chosen), str(len(names)), f"{sum(region['weights'] for region in regions) / 1e6:.2f}", *losses, where)
    return result


def _bits(bits: int) -> str:
    return "float32" if bits == 32 else f"int{bits}"


def experts_table(opened: Bundle) -> Table:
    """One row a routed FFN: the share of held-out tokens that ran each expert, in percent, its spread: 1 when all are used alike, 0
    when every token runs the same, and how many experts no token ran."""
    first = next(iter(opened.report()["quality"].values()))
    rows = table("share of tokens that run each expert, %", "where", ">active", ">spread", ">never used", "experts")
    for name, load in first.get("load_by_region", {}).items():
        spread = f"{value:.2f}" if (value := first.get("spread_by_region", {}).get(name)) is not None else ""
        unused = str(sum(value == 0 for value in load))
        rows.add_row(name, f"{first['active_by_region'][name]:.1%}", spread, unused, " ".join(f"{100 * value:3.0f}" for value in load))
    return rows


def graph_diff(before: Graph, after: Graph) -> Iterator[str]:
    """Unified diff of the two graphs' texts."""
    yield from difflib.unified_diff(before.text().splitlines(), after.text().splitlines(), "dense", "converted", lineterm="", n=1)


def _op(node: Any) -> str:
    from dyncomp.graph import op_name

    return op_name(node).removeprefix("dyncomp.")


def _grouped(title: str, columns: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], str]]) -> Table:
    """Rows that agree in every column become one, with a count and the first and last name."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for cells, name in rows:
        groups.setdefault(cells, []).append(name)
    result = table(f"{title}: {sum(map(len, groups.values()))}", ">count", *columns, "where")
    for cells, names in groups.items():
        result.add_row(str(len(names)), *cells, names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}")
    return result


def _refusals(refusals: list[dict[str, str]]) -> list[Table | str]:
    if not refusals:
        return ["refused: nothing"]
    rows = table("refused", "where", "what", "why", "remedy")
    for item in refusals:
        rows.add_row(item["where"], item["what"], item["reason"], item["remedy"])
    return [rows]
