"""Models nobody has on a list: a hand-written GPT, torch's own encoder, and a network without any FFN."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoGPT(nn.Module):
    """A GPT with its GELU written out, its attention by hand, and names that follow no convention."""

    def __init__(self, vocab: int, d: int, hidden: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.a = nn.Embedding(vocab, d)
        self.b = nn.Embedding(context, d)
        self.c = nn.ModuleList(_NanoBlock(d, hidden, heads, context) for _ in range(layers))
        self.d = nn.LayerNorm(d)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.a(input_ids) + self.b(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.c:
            x = block(x)
        return F.linear(self.d(x), self.a.weight)


class _NanoBlock(nn.Module):
    def __init__(self, d: int, hidden: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.e, self.f = nn.LayerNorm(d), nn.LayerNorm(d)
        self.g, self.h = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.i, self.j = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.register_buffer("k", torch.tril(torch.ones(context, context, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.g(self.e(x)).split(d, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.k[:length, :length], float("-inf"))
        x = x + self.h((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, d))
        return x + self.mlp(self.f(x))

    def mlp(self, x: Tensor) -> Tensor:
        u = self.i(x)
        return self.j(0.5 * u * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * torch.pow(u, 3.0)))))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder``, pre-norm."""

    def __init__(self, d: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class ConvNet(nn.Module):
    """Convolutions and a classifier: nothing that is an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values).mean((2, 3)))
