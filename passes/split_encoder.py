"""An encoder–decoder as two graphs: what is computed once, and what every step of the decoder computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph, TensorSpec
from dyncomp.regions.tokens import token_input

aten = torch.ops.aten


class NotSplit(Exception):
    """Why a graph is no encoder and a decoder."""


def split_encoder(graph: Graph) -> tuple[Graph, Graph]:
    """Cut a graph where what depends on the encoder's inputs alone meets what depends on the decoder's tokens.

    before:  (input_ids [B, T], decoder_input_ids [B, S]) -> logits [B, S, V]
    after:   encoder (input_ids [B, T]) -> encoded_0, encoded_1, …
             decoder (input_ids [B, S], encoded_0, encoded_1, …) -> logits [B, S, V]

    The cut is as late as it can be: of a cross-attention it is the keys and the values, which are then computed once for all steps.
    What depends on sizes only is computed on both sides. The decoder's dimensions are ``batch`` and ``sequence``, others ``source``.

    Raises:
        NotSplit: says why.
    """
    ids = token_input(graph)
    if ids is None:
        raise NotSplit(f"the graph has {len(graph.inputs)} inputs ({', '.join(s.name for s in graph.inputs)})")
    cut = _frontier(graph, ids)
    if not cut:
        raise NotSplit("its decoder reads nothing that depends on the other inputs alone")
    names = [f"encoded_{i}" for i in range(len(cut))]
    return _encoder(graph, ids, cut, names), _decoder(graph, ids, cut, names)


def encode(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder of a graph with a KV cache gives it, by name; nothing where there is none."""
    if graph.encoder is None:
        return {}
    found = graph.encoder(**{s.name: inputs[s.name] for s in graph.encoder.inputs})
    return dict(zip(graph.encoder.outputs, found if isinstance(found, tuple) else (found,), strict=True))


def _frontier(graph: Graph, ids: int) -> list[fx.Node]:
    """The nodes that depend on the encoder's inputs alone and are read by nodes that depend on the decoder's."""
    of_encoder = {d for i, s in enumerate(graph.inputs) if i != ids for d in s.shape if isinstance(d, str)}
    decoder, encoder = {graph.placeholders[ids]}, {n for i, n in enumerate(graph.placeholders) if i != ids}
    for node in graph.nodes:
        dimension = _dimension(graph, node)
        if dimension is not None:
            if dimension not in of_encoder:
                decoder.add(node)
        elif any(n in decoder for n in node.all_input_nodes):
            decoder.add(node)
        elif any(n in encoder for n in node.all_input_nodes):
            encoder.add(node)
    cut = [n for n in graph.nodes if n in encoder and any(u in decoder for u in n.users)]
    if (other := next((n for n in cut if not isinstance(n.meta.get("val"), Tensor)), None)) is not None:
        raise NotSplit(f"its decoder reads the number {other.name}, which depends on the other inputs")
    return cut


def _dimension(graph: Graph, node: fx.Node) -> str | None:
    """The dimension of an input whose size ``node`` is."""
    if node.target is not aten.sym_size.int:
        return None
    shape = graph.shape(node.args[0])  # type: ignore[arg-type]
    size = None if shape is None else shape[node.args[1]]  # type: ignore[index]
    return size if isinstance(size, str) and any(size in s.shape for s in graph.inputs) else None


def _encoder(graph: Graph, ids: int, cut: list[fx.Node], names: list[str]) -> Graph:
    part = graph.copy()
    by_name = {n.name: n for n in part.nodes}
    part._output.args = (tuple(by_name[n.name] for n in cut),)
    part.inputs, part.outputs = tuple(s for i, s in enumerate(graph.inputs) if i != ids), tuple(names)
    part.info |= {"name": f"{graph.info.get('name', 'model')} encoder", "task": "encoder", "context_length": None}
    kept = [n for i, n in enumerate(part.placeholders) if i != ids]
    return _finished(graph, part, [(n, s.shape) for n, s in zip(kept, part.inputs, strict=True)])


def _decoder(graph: Graph, ids: int, cut: list[fx.Node], names: list[str]) -> Graph:
    part = graph.copy()
    by_name = {n.name: n for n in part.nodes}
    spec, tokens = graph.inputs[ids], part.placeholders[ids]
    known: list[tuple[fx.Node, tuple[int | str, ...]]] = [(tokens, spec.shape)]
    anchor = part.placeholders[-1]
    for node, name in zip(cut, names, strict=True):
        with part.module.graph.inserting_after(anchor):
            anchor = part.module.graph.placeholder(name)
        anchor.meta["val"] = node.meta["val"]
        by_name[node.name].replace_all_uses_with(anchor)
        shape = graph.shape(node)
        assert shape is not None
        known.append((anchor, shape))
    renamed = {str(spec.shape[0]): "batch", str(spec.shape[1]): "sequence"}
    for dimension in (d for _, shape in known for d in shape if isinstance(d, str)):
        renamed.setdefault(dimension, f"source_{len(renamed) - 2}" if len(renamed) > 2 else "source")
    part.inputs = tuple(
        TensorSpec(name, node.meta["val"].dtype, tuple(renamed[d] if isinstance(d, str) else d for d in shape))
        for name, (node, shape) in zip(["input_ids", *names], known, strict=True)
    )
    return _finished(graph, part, known)


def _finished(graph: Graph, part: Graph, known: list[tuple[fx.Node, tuple[int | str, ...]]]) -> Graph:
    """``part`` with its sizes taken from the ``known`` inputs and without the others."""
    originals = {n.name: n for n in graph.nodes}
    for node in part.nodes:
        dimension = _dimension(graph, originals[node.name]) if node.name in originals else None
        if dimension is not None:
            source = next(((n, shape.index(dimension)) for n, shape in known if dimension in shape), None)
            if source is not None:
                node.args = source
    _sizes_first(part)
    part.clean()
    kept = {n for n, _ in known}
    for node in part.placeholders:
        if node not in kept:
            if node.users:
                raise NotSplit(f"{next(iter(node.users)).name} needs {node.name}, which is on the other side of the cross-attention")
            part.module.graph.erase_node(node)
    part.clean()
    part.infer_shapes()
    return part


def _sizes_first(part: Graph) -> None:
    """Move the sizes that are read behind the last input: an input that they are taken from now may come after them."""
    anchor = part.placeholders[-1]
    for node in part.nodes:
        if node.target is aten.sym_size.int and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder":
            anchor.append(node)
