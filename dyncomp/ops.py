"""The operations dyncomp adds to ATen. A region becomes one op; each backend lowers that op once.

==============================  ===========================================================================
``dyncomp::routed_ffn``         feed-forward experts under gates; the whole interface of routing
``dyncomp::sparse_linear``      a linear layer that counts small inputs as zero (activation sparsity)
``dyncomp::gated_linear``       a linear layer for the tokens whose gate is open, zeros for the others
``dyncomp::threshold_gates``    scores -> 0/1 gates, every expert whose score is positive
``dyncomp::topk_gates``         scores -> 0/1 gates, the k best experts of each token
``dyncomp::rotary``             rotary position embedding from cos/sin tables
``dyncomp::cached_attention``   causal attention over a KV cache of fixed capacity
``dyncomp::append_cache``       a cache with the entries of new tokens
``dyncomp::round_entries``      keys or values as a cache in int8 gives them back
``dyncomp::key_mask``           an attention mask that hides the tokens whose gate is closed
``dyncomp::sequence_scores``    one score for all tokens of a sequence, from its first ones
==============================  ===========================================================================

Each has a fake kernel (so graphs with it can be exported), and those that graphs without a cache have an autograd formula (so they
train), but for ``rotary``.
Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncomp.activations import ACTIVATIONS

_FEW = 8
"""Tokens of a decoding step."""
_GATHER = 48
"""Gathering a token's inputs for an expert and adding up its outputs takes as long as computing this many neurons (measured in fp32 at
24 to 384 neurons an expert)."""

SCALE_BYTES = 4
"""Of an entry of an int8 cache, after its codes."""


# ---- routed_ffn ----------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::routed_ffn", mutates_args=())
def routed_ffn(x: Tensor, gates: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, activation: str) -> Tensor:
    """``y[t] = sum_e gates[t, e] * FFN_e(x[t])``, computing only the experts whose gate is not zero.

    Args:
        x: [..., d].
        gates: [..., E], same leading shape as ``x``. 0 skips the expert for that token; a row of zeros skips the FFN
            (Mixture-of-Depths); a column of zeros is a pruned expert; a column of ones a shared one.
        w_up: [E, F, d], or [E, 2F, d] for a gated FFN: the F rows that go through the activation, then the F rows
            they multiply.
        b_up: [E, F] or [E, 2F], or None.
        w_down: [E, d_out, F].
        activation: a name in :data:`dyncomp.activations.ACTIVATIONS`.

    Returns:
        [..., d_out]. The bias of the down-projection belongs to the whole FFN and is added outside.

    With every gate 1 the result equals the dense FFN whose neurons the experts are.
    """
    tokens, weights = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    experts, d_out, _ = w_down.shape
    active = weights != 0
    if _all_is_cheaper(active, w_down.shape[2]):
        return routed_ffn_reference(x, gates, w_up, b_up, w_down, activation)
    y = x.new_zeros(tokens.shape[0], d_out)
    always = active.all(0)
    if tokens.shape[0] > 0 and bool(always.any()) and bool((weights[:, always] == 1).all()):
        # Experts that every token uses with gate 1 run as one dense FFN, with no gather.
        kept = always.nonzero().squeeze(-1)
        up, bias, down = (w_up, b_up, w_down) if len(kept) == experts else (
            w_up[kept], None if b_up is None else b_up[kept], w_down[kept])  # fmt: skip
        y = _dense_experts(tokens, up, bias, down, activation)
    else:
        always = torch.zeros_like(always)
    for e in (active.any(0) & ~always).nonzero().squeeze(-1).tolist():
        rows = active[:, e].nonzero().squeeze(-1)
        h = _expand(tokens[rows], w_up[e], None if b_up is None else b_up[e], w_down.shape[2], activation)
        y.index_add_(0, rows, F.linear(h * weights[rows, e, None], w_down[e]))
    return y.reshape(*x.shape[:-1], d_out)


def _all_is_cheaper(active: Tensor, neurons: int) -> bool:
    """Whether every expert for every token takes less time than the active ones gathered: active [N, E]."""
    tokens, experts = active.shape
    if tokens == 0 or experts == 1:
        return False
    if tokens <= _FEW:  # reading weights is what they cost, and gathering those of most experts would read and write them first
        return int(active.any(0).sum()) > experts // 2
    return float(active.float().mean()) * (1 + _GATHER / neurons) > 1


def _expand(x: Tensor, w_up: Tensor, b_up: Tensor | None, neurons: int, activation: str) -> Tensor:
    """Hidden activations of one FFN: x [N, d], w_up [F or 2F, d] -> [N, F]."""
    h = F.linear(x, w_up, b_up)
    if w_up.shape[0] == neurons:
        return ACTIVATIONS[activation](h)
    return ACTIVATIONS[activation](h[..., :neurons]) * h[..., neurons:]


def _dense_experts(x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, activation: str) -> Tensor:
    """All the given experts for all tokens, as one FFN."""
    experts, d_out, neurons = w_down.shape
    split = w_up.unflatten(1, (-1, neurons)).transpose(0, 1).reshape(-1, w_up.shape[-1])  # gate rows of all, then up rows of all
    bias = None if b_up is None else b_up.unflatten(1, (-1, neurons)).transpose(0, 1).reshape(-1)
    h = _expand(x, split, bias, experts * neurons, activation)
    return F.linear(h, w_down.transpose(0, 1).reshape(d_out, -1))


@routed_ffn.register_fake
def _(x: Tensor, gates: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, activation: str) -> Tensor:
    torch._check(x.dim() == gates.dim(), lambda: "x and gates need the same number of dimensions")
    torch._check(gates.shape[-1] == w_up.shape[0], lambda: f"{gates.shape[-1]} gates for {w_up.shape[0]} experts")
    torch._check(w_up.shape[1] in (w_down.shape[2], 2 * w_down.shape[2]), lambda: "w_up must have F or 2F rows for w_down's F columns")
    return x.new_empty(*x.shape[:-1], w_down.shape[1])


def _routed_ffn_setup(ctx, inputs, output) -> None:
    x, gates, w_up, b_up, w_down, activation = inputs
    ctx.save_for_backward(x, gates, w_up, b_up, w_down)
    ctx.activation = activation


def expert_hidden(x: Tensor, w_up: Tensor, b_up: Tensor | None, neurons: int, activation: str) -> Tensor:
    """Hidden activations of every expert: x [..., d] -> [..., E, F] (see :func:`routed_ffn`; ``neurons`` is F)."""
    h = F.linear(x, w_up.reshape(-1, w_up.shape[-1]), None if b_up is None else b_up.reshape(-1)).unflatten(-1, (w_up.shape[0], -1))
    if w_up.shape[1] == neurons:
        return ACTIVATIONS[activation](h)
    return ACTIVATIONS[activation](h[..., :neurons]) * h[..., neurons:]


def routed_ffn_reference(x: Tensor, gates: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, activation: str) -> Tensor:
    """The same sum in plain ATen, every expert for every token: differentiable, and the op's definition in tests."""
    _, d_out, neurons = w_down.shape
    h = expert_hidden(x, w_up, b_up, neurons, activation)
    return F.linear((h * gates[..., None].to(h.dtype)).flatten(-2), w_down.transpose(0, 1).reshape(d_out, -1))


def _routed_ffn_backward(ctx, grad: Tensor):
    """The exact gradient: recomputed with every expert, because d y / d gate = FFN_e(x) also where the gate is zero,
    and that is what teaches a router about the experts it did not choose."""
    with torch.enable_grad():
        inputs: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        x, gates, w_up, b_up, w_down = inputs
        y = routed_ffn_reference(x, gates, w_up, b_up, w_down, ctx.activation)
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and t is not None]
        grads = iter(torch.autograd.grad(y, wanted, grad))
    return (*(next(grads) if need else None for need in ctx.needs_input_grad[:5]), None)


routed_ffn.register_autograd(_routed_ffn_backward, setup_context=_routed_ffn_setup)


# ---- sparse_linear -------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor) -> Tensor:
    """``linear(keep_large(x, thresholds), weight, bias)``: a linear layer that counts an input as zero unless it exceeds its threshold.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N], or None.
        thresholds: [K]; input j counts where ``|x_j| > thresholds[j]`` (and where it is NaN). The same number for every input is
            TEAL (2408.14690); ``t / |W[:, j]|`` is WINA (2505.19427); 0 leaves the layer dense, infinity removes an input.

    Returns:
        [..., N].

    Kernels for one token read no weights of the other inputs. The gradient is that of the product with the mask held fixed: an
    input that counts as zero gets none, and the thresholds get none.
    """
    return sparse_linear_reference(x, weight, bias, thresholds)


def sparse_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor) -> Tensor:
    """The same in plain ATen."""
    return F.linear(keep_large(x, thresholds), weight, bias)


def keep_large(x: Tensor, thresholds: Tensor) -> Tensor:
    """``x`` [..., K] with zeros where ``|x_j| <= thresholds[j]``."""
    return torch.where(x.abs() <= thresholds, 0.0, x)


@sparse_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, thresholds: Tensor) -> Tensor:
    torch._check(thresholds.dim() == 1 and thresholds.shape[0] == weight.shape[1], lambda: "sparse_linear needs one threshold an input")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _sparse_linear_setup(ctx, inputs, output) -> None:
    x, weight, bias, thresholds = inputs
    ctx.save_for_backward(x, weight, thresholds)
    ctx.biased = bias is not None


def _sparse_linear_backward(ctx, grad: Tensor):
    x, weight, thresholds = ctx.saved_tensors
    kept = keep_large(x, thresholds)
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        torch.where(x.abs() <= thresholds, 0.0, grad @ weight) if ctx.needs_input_grad[0] else None,
        rows.T @ kept.reshape(-1, kept.shape[-1]) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None,
        None,
    )


sparse_linear.register_autograd(_sparse_linear_backward, setup_context=_sparse_linear_setup)


# ---- gated_linear --------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::gated_linear", mutates_args=())
def gated_linear(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[t] = gates[t] * (W x[t] + b)``, computing only the tokens whose gate is not zero.

    Around an attention it is what ``routed_ffn`` is for an FFN: with the projections of the queries and of the output gated, a token
    whose gate is 0 adds nothing to the residual stream, and its keys and values are there for the others all the same.

    Args:
        x: [..., d]. gates: [..., 1], same leading shape. weight: [d_out, d]. bias: [d_out] or None.

    Returns:
        [..., d_out].
    """
    tokens, weights = x.reshape(-1, x.shape[-1]), gates.reshape(-1, 1)
    rows = weights.squeeze(1).nonzero().squeeze(1)
    if len(rows) == len(tokens):
        y = gated_linear_reference(tokens, weights, weight, bias)
    else:
        y = x.new_zeros(len(tokens), weight.shape[0])
        y[rows] = F.linear(tokens[rows], weight, bias) * weights[rows]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def gated_linear_reference(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain ATen, every token computed: differentiable, also by the gates."""
    y = F.linear(x, weight, bias)
    return y * gates.to(y.dtype)


@gated_linear.register_fake
def _(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.dim() == gates.dim(), lambda: "x and gates need the same number of dimensions")
    torch._check(gates.shape[-1] == 1, lambda: f"{gates.shape[-1]} gates for one linear layer")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _gated_linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gated_linear_backward(ctx, grad: Tensor):
    """The exact gradient: recomputed for every token, because d y / d gate = W x + b also where the gate is zero."""
    with torch.enable_grad():
        inputs: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        x, gates, weight, bias = inputs
        y = gated_linear_reference(x, gates, weight, bias)
        # A bias that is left out has a place among the inputs, and none in needs_input_grad.
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and t is not None]
        grads = iter(torch.autograd.grad(y, wanted, grad))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)


gated_linear.register_autograd(_gated_linear_backward, setup_context=_gated_linear_setup)


# ---- gates ---------------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::threshold_gates", mutates_args=())
def threshold_gates(scores: Tensor) -> Tensor:
    """1 where the score is positive, 0 elsewhere (the threshold is part of the router's bias): [..., E] -> [..., E].

    The gradient is straight-through: that of ``sigmoid(scores)``.
    """
    return (scores > 0).to(scores.dtype)


@threshold_gates.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("dyncomp::topk_gates", mutates_args=())
def topk_gates(scores: Tensor, k: int) -> Tensor:
    """1 for the ``k`` highest scores of each token, 0 elsewhere: [..., E] -> [..., E]. Straight-through gradient as above."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)


@topk_gates.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    torch._check(0 < k <= scores.shape[-1], lambda: f"k = {k} of {scores.shape[-1]} experts")
    return torch.empty_like(scores)


def _gates_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.arguments = len(inputs)


def _gates_backward(ctx, grad: Tensor):
    (scores,) = ctx.saved_tensors
    p = torch.sigmoid(scores)
    return (grad * p * (1 - p), *([None] * (ctx.arguments - 1))) if ctx.arguments > 1 else grad * p * (1 - p)


threshold_gates.register_autograd(_gates_backward, setup_context=_gates_setup)
topk_gates.register_autograd(_gates_backward, setup_context=_gates_setup)


# ---- gates of tokens across a sequence -----------------------------------------------------------------------------
def key_mask_reference(gates: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    position = torch.arange(gates.shape[1], device=gates.device)
    distance = position[:, None] - position  # query - key
    seen = (gates != 0).transpose(1, 2).unsqueeze(1) | (distance == 0)
    if causal:
        seen = seen & (distance >= 0)
    hidden = torch.where(seen, 0.0, float("-inf")).to(gates.dtype)
    if mask is None:
        return hidden
    return hidden + (torch.where(mask, 0.0, float("-inf")).to(gates.dtype) if mask.dtype == torch.bool else mask)


@torch.library.custom_op("dyncomp::key_mask", mutates_args=())
def key_mask(gates: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """What is added to attention scores [B, H, S, S] so that a token attends to itself and to tokens whose gate is not 0.

    Args:
        gates: [B, S, 1].
        mask: what the attention's own mask allows, or adds, [B or 1, H or 1, S, S]; None for everything.
        causal: nothing after a token is seen.

    Returns:
        [B, H or 1, S, S]. No gradient reaches the gates through it.
    """
    return key_mask_reference(gates, mask, causal).contiguous()


key_mask.register_fake(lambda *given: key_mask_reference(*given).contiguous())


def _key_mask_setup(ctx, inputs, output) -> None:
    ctx.shape = inputs[1].shape if inputs[1] is not None else None


def _key_mask_backward(ctx, grad: Tensor):
    return None, grad.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None, None


key_mask.register_autograd(_key_mask_backward, setup_context=_key_mask_setup)


def sequence_scores_reference(scores: Tensor, first: int, positions: Tensor | None = None) -> Tensor:
    every = torch.arange(scores.shape[1], device=scores.device)[:, None]
    mean = torch.where(every < first, scores, 0.0).sum(1, keepdim=True) / first
    early = (every if positions is None else positions[..., None]) < first
    return torch.where(early, torch.ones_like(mean), mean)


@torch.library.custom_op("dyncomp::sequence_scores", mutates_args=())
def sequence_scores(scores: Tensor, first: int, positions: Tensor | None = None) -> Tensor:
    """One score for a sequence, the mean of its first tokens' scores; these tokens themselves, which it cannot know yet, get 1.

    Args:
        scores: [B, N, 1], of the positions from 0 on.
        first: how many tokens decide.
        positions: [B, S] int64, of the tokens that want it; None for all N.

    Returns:
        [B, S, 1].
    """
    return sequence_scores_reference(scores, first, positions)


sequence_scores.register_fake(sequence_scores_reference)


def _sequence_setup(ctx, inputs, output) -> None:
    scores, ctx.first, positions = inputs
    ctx.save_for_backward(scores, positions)


def _sequence_backward(ctx, grad: Tensor):
    scores, positions = ctx.saved_tensors
    with torch.enable_grad():
        scores = scores.detach().requires_grad_()
        return (*torch.autograd.grad(sequence_scores_reference(scores, ctx.first, positions), scores, grad), None, None)


sequence_scores.register_autograd(_sequence_backward, setup_context=_sequence_setup)


# ---- rotary --------------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al., 2104.09864) of the first ``2 * cos.shape[1]`` features of each head.

    Args:
        x: [B, H, S, D] queries or keys.
        cos, sin: [P, R / 2] tables by position, R <= D rotated features.
        positions: [B, S] int64, below P.
        interleaved: pairs are (0, 1), (2, 3) …; otherwise (0, R/2), (1, R/2 + 1) …
    """
    half = cos.shape[1]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [B, 1, S, R/2]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([turned, kept], -1)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- caches --------------------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::append_cache", mutates_args=())
def append_cache(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """``cache`` [B, H, C, D] with ``new`` [B, H, S, D] at each row's positions past_length … past_length + S - 1."""
    positions = past_length[:, None] + torch.arange(new.shape[2], device=new.device)
    cache = cache.clone()
    cache[torch.arange(len(cache), device=new.device)[:, None], :, positions] = new.transpose(1, 2)
    return cache


@append_cache.register_fake
def _(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    return torch.empty_like(cache)


def encode_entries(x: Tensor) -> Tensor:
    """Keys or values [..., D] as an int8 cache keeps them: uint8 [..., D + 4], D codes (int8) and then their scale (float32), the largest
    magnitude / 127, so one scale for each token and head. An entry with an infinity or a NaN becomes NaN."""
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    finite = peak.isfinite()
    codes = torch.where(finite & (peak >= 1e-35), (x * (127 / peak)).round(), 0.0).to(torch.int8)
    scale = torch.where(finite, torch.where(peak >= 1e-35, peak / 127, 0.0), float("nan"))
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], -1)


def decode_entries(entries: Tensor) -> Tensor:
    """What :func:`encode_entries` kept: [..., D + 4] uint8 -> [..., D] float32."""
    codes, scale = entries[..., :-SCALE_BYTES].view(torch.int8), entries[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return codes.float() * scale


@torch.library.custom_op("dyncomp::round_entries", mutates_args=())
def round_entries(x: Tensor, bits: int) -> Tensor:
    """Keys or values [..., D] as a cache of so many bits gives them back: 8 rounds as :func:`encode_entries` does, 32 does not.

    Straight-through gradient.
    """
    return x.clone() if bits == 32 else decode_entries(encode_entries(x)).to(x.dtype)


@round_entries.register_fake
def _(x: Tensor, bits: int) -> Tensor:
    torch._check(bits in (8, 32), lambda: f"a cache of {bits} bits")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


round_entries.register_autograd(lambda ctx, grad: (grad, None))


# ---- cached attention ----------------------------------------------------------------------------------------------
@torch.library.custom_op("dyncomp::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past_length: Tensor, scale: float, window: int,
    softcap: float = 0.0, present: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention of S new tokens over a KV cache; the same op serves prefill (S = prompt) and decode (S = 1).

    Args:
        q: [B, H, S, D]. k, v: [B, Hkv, S, D]; query head i reads key head i * Hkv // H (grouped-query attention).
        key_cache, value_cache: [B, Hkv, C, D] of capacity C; or uint8 [B, Hkv, C, D + 4], in int8 (:func:`encode_entries`).
        past_length: [B] int64, valid entries of each row's cache; past_length + S must not exceed C.
        scale: factor on q @ k.
        window: a query sees its own position and the ``window - 1`` before it; 0 means all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax; 0 means they do not.
        present: [B, 1, C, 1], 0 for entries that no token attends to, the new tokens' included; a new token with a 0 gets zeros.
        bias: [H, P], added to the score of a key that lies 0, 1 … P - 1 positions back (ALiBi, 2108.12409; T5's buckets, 1910.10683).

    Returns:
        out [B, H, S, D] and the caches with the new keys and values at positions past_length … past_length + S - 1.
        Rows of different lengths are padded on the right: what is written for the padding lies beyond the row's
        length and is overwritten by the next step.
    """
    batch, heads, length, _ = q.shape
    capacity = key_cache.shape[2]
    positions = past_length[:, None] + torch.arange(length, device=q.device)  # [B, S]
    coded = key_cache.dtype == torch.uint8
    new_k, new_v = (encode_entries(k), encode_entries(v)) if coded else (k, v)
    key_cache, value_cache = append_cache(key_cache, new_k, past_length), append_cache(value_cache, new_v, past_length)
    used = min(capacity, int(past_length.max()) + length) if batch else 0
    slot = torch.arange(used, device=q.device)
    visible = slot <= positions[..., None]  # [B, S, used]
    if window:
        visible &= slot > positions[..., None] - window
    if present is not None:
        absent = present[:, 0, :, 0].gather(1, positions) == 0  # [B, S]
        visible &= (present[:, 0, None, :used, 0] != 0) | absent[..., None]  # what these see does not count, and must be something
    groups = heads // k.shape[1]
    keys, values = (c[:, :, :used] for c in (key_cache, value_cache))
    if coded:
        keys, values = decode_entries(keys).to(q.dtype), decode_entries(values).to(q.dtype)
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    if softcap or bias is not None:
        scores = q @ keys.transpose(2, 3) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if bias is not None:
            distance = (positions[..., None] - slot).clamp_min(0)  # [B, S, used]
            scores = scores + bias[:, distance].transpose(0, 1)
        out = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1) @ values
    else:
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None], scale=scale)
    if present is not None:
        out = out.masked_fill(absent[:, None, :, None], 0.0)
    return out, key_cache, value_cache


@cached_attention.register_fake
def _(q, k, v, key_cache, value_cache, past_length, scale, window, softcap=0.0, present=None, bias=None):
    return (
        q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3]),
        torch.empty_like(key_cache),
        torch.empty_like(value_cache),
    )
