"""Give a decoder a KV cache: one graph that serves prefill and decode."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from dyncomp.passes.position_tables import NotTabulated, PositionTables
from dyncomp.passes.split_encoder import NotSplit, split_encoder
from dyncomp.passes.verify_cache import verify_cache
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph, TensorSpec
from dyncomp.ops import SCALE_BYTES, append_cache, cached_attention, sequence_scores
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.attention import Attention, find_attentions
from dyncomp.regions.linear import PRODUCTS
from dyncomp.regions.mask import relative_bias
from dyncomp.regions.partial import SHAPE_QUERIES, ShapeOnly, dominator
from dyncomp.regions.refusal import Refusal

aten = torch.ops.aten
_SEQUENCE = sequence_scores._opoverload
_LARGEST_BIAS = 2**28  # numbers, a gigabyte
_HEAD = {*PRODUCTS, torch.ops.dyncomp.sparse_linear.default}


@dataclass(frozen=True)
class AddKVCache(Pass):
    """Keep the keys and values of past tokens, so that each step computes only the new ones.

    before:  (input_ids [B, S]) -> logits [B, S, V]
    after:   (input_ids [B, S], past_length [B], key_cache_0 [B, Hkv, C, D], value_cache_0, …)
             -> logits, new_key_cache_0, new_value_cache_0, …

    An encoder–decoder becomes two graphs (``split_encoder``): the one above, with the keys and values of its cross-attentions as
    further inputs ``encoded_0 [B, H, T, D]`` …, and :attr:`Graph.encoder`, which gives them.

    Caches of keys and values that the graph rounds (``quantize-cache``) are int8, ``uint8 [B, Hkv, C, D + 4]``
    (:func:`dyncomp.ops.encode_entries`).

    Tokens that are absent from an attention (``skip-depth{kv=absent}``) are marked in ``present_cache_0 [B, 1, C, 1]``, and scores that
    decide for a whole sequence (``gates=sequence``) are kept in ``score_cache_0``, as keys and values are.

    Each causal attention becomes ``dyncomp.cached_attention``; rotary embeddings become ``dyncomp.rotary`` and all other
    functions of the position become tables, both read at ``past_length + arange(S)``. Rows may have different lengths:
    they are padded on the right, and each has its own ``past_length``. ``past_length + S`` must not exceed C, nor C the
    context length. All or nothing: if anything is refused the graph stays as it is. The result is held against the
    graph before on random tokens, in chunks and with rows of different lengths.
    """

    name = "add-kv-cache"
    context_length: int = 0  # positions to tabulate; 0: the model's context length
    logits: str = "all"  # "chosen" adds an input chosen: i64[batch, chosen] and computes the logits of these tokens of each row only

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        if self.logits not in ("all", "chosen"):
            raise RequestError(f"add-kv-cache{{logits={self.logits}}}: logits is 'all' or 'chosen'")
        context = self.context_length or int(graph.info.get("context_length") or 0)
        if context <= 0:
            return _refused(graph, "the model's context length is unknown", "give add-kv-cache{context-length=N}")
        if (reason := _unsuitable_inputs(graph)) is not None:
            return _refused(graph, reason, "trace the model with input_ids: i64[batch, sequence] as its only input")
        if ahead := [name for name, facts in graph.info.get("depth", {}).items() if facts.get("gates") == "expert-choice"]:
            reason = f"whether a token skips {ahead[0]} depends on the tokens after it (skip-depth{{gates=expert-choice}})"
            return _refused(graph, reason, "skip-depth{gates=expert-choice predictor=true}")
        work = graph.copy()
        if len(graph.inputs) > 1:
            try:
                encoder, work = split_encoder(graph)
            except NotSplit as found:
                return _refused(graph, str(found), "trace the model with input_ids: i64[batch, sequence] as its only input")
            work.encoder = encoder
        attentions, refused = find_attentions(work)
        crossing = _crossing(work, attentions)
        attentions = [a for a in attentions if a not in crossing]
        refused += [r for a in (*attentions, *crossing) if (r := _refusal(a, work, a in crossing)) is not None]
        if not attentions and not refused:
            return _refused(graph, "the graph has no attention", "without attention there is nothing to cache")
        if refused:
            return PassResult(refused=refused)
        for attention in crossing:
            _see_everything(attention)
        if biases := [a for a in attentions if a.mask.kind == "relative" and a.heads * context**2 > _LARGEST_BIAS]:
            reason = f"the bias of {biases[0].path} is a matrix of {context} x {context} positions for each of {biases[0].heads} heads"
            return _refused(graph, reason, "give add-kv-cache{context-length=N} with fewer")
        try:
            facts = _Rewrite(work, context, self.logits == "chosen").apply(attentions)
        except NotTabulated as found:
            return _refused(graph, str(found), "its positions cannot be moved: run it without a cache")
        error, where = verify_cache(graph, work)
        if where is not None:
            reason = f"with a cache the result differs by {error:.1e} (relative), first at {where}"
            return _refused(graph, reason, "something other than attention mixes tokens: run it without a cache")
        _round_caches(work, attentions)
        graph.module, graph.inputs, graph.outputs, graph.info = work.module, work.inputs, work.outputs, work.info
        graph.quantized, graph.encoder = work.quantized, work.encoder
        return PassResult(changed=[a.path for a in attentions], facts={**facts, "relative_error": error})


class _Rewrite:
    def __init__(self, graph: Graph, context: int, chosen: bool) -> None:
        self.graph, self.context, self.chosen = graph, context, chosen
        self.made: set[fx.Node] = set()
        self._biases: list[str] = []

    def apply(self, attentions: list[Attention]) -> dict[str, Any]:
        graph = self.graph
        ids = graph.placeholders[0]
        batch = str(graph.inputs[0].shape[0])
        self._anchor = graph.placeholders[-1]
        past = self._input(TensorSpec("past_length", torch.int64, (batch,)))
        chosen = self._input(TensorSpec("chosen", torch.int64, (batch, "chosen"))) if self.chosen else None
        caches = []
        for index, attention in enumerate(attentions):
            shapes = [(batch, attention.kv_heads, "capacity", size) for size in (attention.head_dim, attention.value_dim)]
            dtypes = [n.meta["val"].dtype for n in (attention.key, attention.value)]
            names = (f"key_cache_{index}", f"value_cache_{index}")
            caches.append([self._input(TensorSpec(n, d, s)) for n, d, s in zip(names, dtypes, shapes, strict=True)])
        hidden = {a.output: self._column(f"present_cache_{i}", a.present) for i, a in enumerate(attentions) if a.present is not None}
        sequences = [n for n in graph.nodes if n.target is _SEQUENCE]
        kept = [self._column(f"score_cache_{i}", n.args[0]) for i, n in enumerate(sequences)]  # type: ignore[arg-type]
        with graph.module.graph.inserting_after(self._anchor):
            size = self._call(aten.sym_size.int, ids, 1)
        with graph.module.graph.inserting_after(size):
            steps = self._call(aten.arange.default, size)
        with graph.module.graph.inserting_after(steps):
            column = self._call(aten.unsqueeze.default, past, 1)
        with graph.module.graph.inserting_after(column):
            positions = self._call(aten.add.Tensor, column, steps)
        tables = PositionTables(graph, positions, self.context, self._call)
        rotary = {r.result: tables.replace_rotary(r) for a in attentions for r in a.rotary if r is not None}
        present = {output: self._append(cache, column, past) for output, (cache, column) in hidden.items()}
        updated = [n for a, c in zip(attentions, caches, strict=True) for n in self._attend(a, c, past, rotary, present.get(a.output))]
        updated += present.values()
        for node, (cache, column) in zip(sequences, kept, strict=True):
            updated.append(scores := self._append(cache, column, past))
            with graph.module.graph.inserting_before(node):
                column = self._call(aten.squeeze.dim, scores, 1)
            node.args = (column, node.args[1], positions)
            self.made.add(node)
        if chosen is not None:
            self._only_chosen(chosen)
        output = graph._output
        output.args = ((*graph.output_nodes, *updated),)
        graph.outputs = (*graph.outputs, *(f"new_{s.name}" for s in graph.inputs if "_cache_" in s.name))
        tables.replace_rest(self.made)
        graph.clean()
        graph.infer_shapes()
        graph.info["kv_cache"] = {
            "context_length": self.context,
            "logits": "chosen" if self.chosen else "all",
            "layers": [
                {"kv_heads": a.kv_heads, "key_dim": a.head_dim, "value_dim": a.value_dim, "window": a.mask.window} for a in attentions
            ],
        }
        if any(a.cache_bits == 8 for a in attentions):
            graph.info["kv_cache"] |= {"bits": 8, "bytes_per_token": sum(a.cache_bytes for a in attentions)}
        made = [*tables.names, *self._biases]
        return {"attentions": len(attentions), "rotary": len(rotary), "tables": made, "context_length": self.context}

    def _column(self, name: str, column: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(an input to keep a number of each token in, the numbers [B, S, 1] of the new tokens)."""
        batch = str(self.graph.inputs[0].shape[0])
        return self._input(TensorSpec(name, column.meta["val"].dtype, (batch, 1, "capacity", 1))), column

    def _append(self, cache: fx.Node, column: fx.Node, past: fx.Node) -> fx.Node:
        with self.graph.module.graph.inserting_after(column):
            heads = self._call(aten.unsqueeze.default, column, 1)
        with self.graph.module.graph.inserting_after(heads):
            return self._call(append_cache._opoverload, cache, heads, past)

    def _attend(
        self, a: Attention, caches: list[fx.Node], past: fx.Node, rotary: dict[fx.Node, fx.Node], present: fx.Node | None
    ) -> list[fx.Node]:
        query, key, value = (rotary.get(n, n) for n in (a.query, a.key, a.value))
        with self.graph.module.graph.inserting_before(a.output):
            if a.key_transposed:
                key = self._call(aten.transpose.int, key, 2, 3)
            optional = [present, self._bias(a)]
            while optional and optional[-1] is None:
                optional.pop()
            settings = (a.scale, a.mask.window, a.softcap, *optional)
            node = self._call(cached_attention._opoverload, query, key, value, *caches, past, *settings)
            out, *new = (self._call(operator.getitem, node, i) for i in range(3))
        for made in (node, out, *new):
            made.meta["path"] = a.path
        a.output.replace_all_uses_with(out)
        return new

    def _bias(self, a: Attention) -> fx.Node | None:
        """[H, context]: what an attention adds to the scores by distance; the same table for layers that add the same."""
        if a.mask.kind != "relative":
            return None
        assert a.additive is not None
        bias = relative_bias(a.additive(self.context))
        if bias is None:
            raise NotTabulated(f"what {a.path} adds to its scores does not depend on the distance alone")
        bias = bias.expand(a.heads, -1).contiguous()
        name = next((n for n in self._biases if torch.equal(self.graph.tensor(n), bias)), None)
        if name is None:
            name = f"tables.bias_{len(self._biases)}"
            self.graph.add_tensor(name, bias, trainable=False)
            self._biases.append(name)
        return self.graph.read(name)

    def _only_chosen(self, chosen: fx.Node) -> None:
        """Gather the hidden states of the chosen tokens before the vocabulary head."""
        logits = self.graph.output_nodes[0]
        head = vocabulary_head(self.graph, logits)
        hidden = next(n for n in head.all_input_nodes if n.op != "get_attr")
        with self.graph.module.graph.inserting_before(head):
            index = self._call(aten.unsqueeze.default, chosen, 2)
            index = self._call(aten.expand.default, index, [-1, -1, int(hidden.meta["val"].shape[2])])
            only = self._call(aten.gather.default, hidden, 1, index)  # [B, chosen, d]
        head.replace_input_with(hidden, only)

    def _input(self, spec: TensorSpec) -> fx.Node:
        with self.graph.module.graph.inserting_after(self._anchor):
            self._anchor = self.graph.module.graph.placeholder(spec.name)
        self.graph.inputs = (*self.graph.inputs, spec)
        self.made.add(self._anchor)
        return self._anchor

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.module.graph.call_function(target, args)
        self.made.add(node)
        return node


def _round_caches(graph: Graph, attentions: list[Attention]) -> None:
    """Make the caches of rounded keys and values int8: after the check, for which a step of the rounding would be a difference."""
    coded = {f"{kind}_cache_{i}" for i, a in enumerate(attentions) if a.cache_bits == 8 for kind in ("key", "value")}
    if not coded:
        return
    graph.inputs = tuple(
        TensorSpec(s.name, torch.uint8, (*s.shape[:3], int(s.shape[3]) + SCALE_BYTES)) if s.name in coded else s for s in graph.inputs
    )
    graph.infer_shapes()


def vocabulary_head(graph: Graph, logits: fx.Node) -> fx.Node:
    """The projection whose result is the logits, but for scaling or soft-capping.

    Raises:
        NotTabulated: there is none with a constant weight and [batch, sequence, d] input.
    """
    shapes, order = ShapeOnly(graph), {n: i for i, n in enumerate(graph.nodes)}
    node: fx.Node | None = logits
    for _ in range(8):
        if node is None:
            break
        if node.target in _HEAD:
            inputs = [n for n in node.all_input_nodes if n not in shapes]
            if len(inputs) == 1 and isinstance(inputs[0].meta.get("val"), Tensor) and inputs[0].meta["val"].dim() == 3:
                return node
        node = dominator(node, order, shapes)
    raise NotTabulated("the projection that makes the logits was not found; use add-kv-cache{logits=all}: the output")


def _unsuitable_inputs(graph: Graph) -> str | None:
    spec = graph.inputs[0]
    if len(graph.inputs) > 1:
        return None  # split_encoder looks at these
    if spec.dtype != torch.int64 or len(spec.shape) != 2 or not all(isinstance(d, str) for d in spec.shape):
        return f"its input is {spec}"
    return None


def _crossing(graph: Graph, attentions: list[Attention]) -> list[Attention]:
    """The attentions whose keys and values do not depend on the tokens."""
    depends = {graph.placeholders[0]}
    for node in graph.nodes:
        if node.target not in SHAPE_QUERIES and any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    return [a for a in attentions if a.key not in depends and a.value not in depends]


def _see_everything(attention: Attention) -> None:
    """Drop the mask of a cross-attention that hides nothing: it would have to be made for as many tokens as there are."""
    node = attention.output
    if attention.mask.kind == "none" and node.target is aten.scaled_dot_product_attention.default:
        node.args, node.kwargs = node.args[:3], {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}


def _refusal(attention: Attention, graph: Graph, crossing: bool) -> Refusal | None:
    if crossing and attention.mask.kind in ("none", "given"):
        return None
    sequence = graph.inputs[0].shape[1]
    query = graph.shape(attention.query)
    reasons = {
        "none": ("every token sees the whole sequence (bidirectional)", "an encoder runs without a cache"),
        "given": ("its mask depends on the values of an input", "trace the model with input_ids only"),
        "bias": ("what is added to its scores depends on the positions, not on how far apart they are alone", "run it without a cache"),
        "other": ("its mask is neither causal nor a causal window", "run it without a cache"),
    }
    if not crossing and (not attention.self_attention or query is None or query[2] != sequence):
        reason, remedy = "its queries and keys are not the tokens of the input (cross-attention, or pooled)", "run it without a cache"
    elif attention.mask.kind in reasons:
        reason, remedy = reasons[attention.mask.kind]
    elif attention.heads % attention.kv_heads:
        reason, remedy = f"{attention.heads} query heads over {attention.kv_heads} key heads", "run it without a cache"
    else:
        return None
    return Refusal(attention.path, "attention", reason, remedy)


def _refused(graph: Graph, reason: str, remedy: str) -> PassResult:
    return PassResult(refused=[Refusal(str(graph.info.get("name", "model")), AddKVCache.name, reason, remedy)])
