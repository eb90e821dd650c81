"""How deep each token of a text goes through a model whose tokens can skip."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.evaluate import model_inputs
from dyncomp.graph import Graph
from dyncomp.regions.depth import KVBytes, find_skips, kv_bytes
from dyncomp.report.tables import table
from dyncomp.sweep import Sweep

_SHADES = ("#3b4cc0", "#6f92f3", "#aac7fd", "#dddcdc", "#f7b89c", "#e7745b", "#b40426")
"""Shallow to deep (Moreland 2009, the diverging map of ParaView)."""


@dataclass(frozen=True)
class Depth:
    """Which token computed what.

    Args:
        pieces: the text of each token.
        gates: names of what tokens can skip.
        computed: [gates, tokens] bool.
        kv: what the keys and values of such a text need; None where no attention is skipped.
    """

    pieces: list[str]
    gates: list[str]
    computed: Tensor
    kv: KVBytes | None = None

    @property
    def share(self) -> Tensor:
        """[tokens]: the fraction of the gates that each token passed through."""
        return self.computed.float().mean(0)

    def by_class(self) -> dict[str, tuple[int, float]]:
        """Kind of token -> (how many, mean fraction)."""
        kinds = [_kind(piece) for piece in self.pieces]
        return {kind: (kinds.count(kind), float(self.share[[k == kind for k in kinds]].mean())) for kind in _KINDS if kind in kinds}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        share = self.computed.float().mean(1)
        return {
            "tokens": [{"text": p, "computed": round(float(s), 4)} for p, s in zip(self.pieces, self.share, strict=True)],
            "gates": {name: round(float(s), 4) for name, s in zip(self.gates, share, strict=True)},
            "classes": {kind: {"tokens": n, "computed": round(s, 4)} for kind, (n, s) in self.by_class().items()},
            **({"kv_bytes_per_token": {"dense": self.kv.dense, "held": round(self.kv.held, 1)}} if self.kv is not None else {}),
        }


_KINDS = ("word", "piece of a word", "number", "punctuation", "space")


def _kind(piece: str) -> str:
    stripped = piece.strip()
    if not stripped:
        return "space"
    if any(c.isdigit() for c in stripped):
        return "number"
    if not any(c.isalpha() for c in stripped):
        return "punctuation"
    return "word" if piece[0].isspace() else "piece of a word"


def depth_of(graph: Graph, tokenizer: Any, text: str) -> Depth:
    """Run ``text`` through the graph and note which gates were open.

    Raises:
        RequestError: no token can skip anything, the model has no tokenizer, or the text has no token.
    """
    skips = find_skips(graph)
    if not skips:
        raise RequestError("every token computes every layer of this model", hint="convert it with --recipe depth")
    if tokenizer is None:
        raise RequestError("the bundle has no tokenizer, so no text can be shown")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    limit = int(graph.info.get("context_length") or ids.shape[1])
    ids = ids[:, :limit]
    if not ids.shape[1]:
        raise RequestError("the text has no token")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, value: seen.__setitem__(name, value[0, :, 0] != 0)

    Sweep(graph, [model_inputs(graph, ids)]).advance(graph.output_nodes[0], watch={s.gates: keep(s.name) for s in skips})
    names = [s.name for s in skips]
    pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    kv = kv_bytes(graph, {name: float(gates.float().mean()) for name, gates in seen.items()})
    return Depth(pieces, [n.removesuffix(".depth") for n in names], torch.stack([seen[n] for n in names]), kv)


def depth_items(depth: Depth) -> list[Text | Table | str]:
    """The picture for a terminal: the text coloured by depth, a histogram by gate, and kinds of tokens."""
    picture = Text()
    shade = _shades(depth.share)
    for piece, index in zip(depth.pieces, shade, strict=True):
        picture.append(piece, style=f"on {_SHADES[index]} {'white' if index in (0, 1, 5, 6) else 'black'}")
    low, high = float(depth.share.min()), float(depth.share.max())
    legend = Text(f"computed {low:.0%} ")
    for color in _SHADES:
        legend.append("  ", style=f"on {color}")
    legend.append(f" {high:.0%} of what a token can skip")
    layers = table("tokens that compute it", "layer", ">share", "")
    for name, share in zip(depth.gates, depth.computed.float().mean(1).tolist(), strict=True):
        layers.add_row(name, f"{share:.0%}", "█" * round(40 * share))
    kinds = table("kinds of tokens", "", ">tokens", ">computed")
    for kind, (count, share) in depth.by_class().items():
        kinds.add_row(kind, str(count), f"{share:.0%}")
    return [picture, legend, layers, kinds, *([_kv_line(depth.kv)] if depth.kv is not None else [])]


def _kv_line(kv: KVBytes) -> str:
    return f"keys and values: {kv.held:,.0f} of {kv.dense:,.0f} bytes a token are kept"


def depth_html(depth: Depth) -> str:
    """The same picture as a page of its own; hovering shows a token's figure."""
    spans = "".join(
        f'<span style="background:{_SHADES[i]};color:{"#fff" if i in (0, 1, 5, 6) else "#000"}" title="{s:.0%}">'
        f"{html.escape(p).replace(chr(10), '↵<br>')}</span>"
        for p, s, i in zip(depth.pieces, depth.share.tolist(), _shades(depth.share), strict=True)
    )
    layers = "".join(
        f'<tr><td>{html.escape(n)}</td><td><div style="width:{300 * s:.0f}px"></div></td><td>{s:.0%}</td></tr>'
        for n, s in zip(depth.gates, depth.computed.float().mean(1).tolist(), strict=True)
    )
    kinds = "".join(f"<tr><td>{k}</td><td>{n} tokens</td><td>{s:.0%}</td></tr>" for k, (n, s) in depth.by_class().items())
    style = "body{font:15px/1.7 sans-serif;max-width:60em;margin:2em}p{white-space:pre-wrap}div{background:#6f92f3;height:10px}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>depth of tokens</title><style>{style}</style>'
        f"<p>{spans}</p><table>{kinds}</table><h3>tokens that compute each layer</h3><table>{layers}</table>"
        f"{f'<p>{_kv_line(depth.kv)}</p>' if depth.kv is not None else ''}\n"
    )


def _shades(share: Tensor) -> list[int]:
    """The shade of each token, from the least to the most in this text."""
    low, high = float(share.min()), float(share.max())
    scale = (len(_SHADES) - 1) / max(high - low, 1e-9)
    return [round((float(s) - low) * scale) for s in share]
