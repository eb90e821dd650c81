"""Models nobody has on a list: a hand-written GPT, a vision transformer, torch's own encoder, and a network without any FFN."""

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
        self.k: Tensor
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


class TimmViT(nn.Module):
    """A vision transformer as timm writes them: queries, keys and values in one projection, LayerScale, a class token, a pooled head."""

    def __init__(self, d: int, hidden: int, layers: int, heads: int, *, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, d))
        self.blocks = nn.Sequential(*(_TimmBlock(d, hidden, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d, eps=1e-6), nn.Linear(d, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class _TimmBlock(nn.Module):
    def __init__(self, d: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.heads, self.scale = heads, (d // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Dropout(0.1), nn.Identity(), nn.Linear(hidden, d), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attention(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, d))


class ConvNet(nn.Module):
    """Convolutions and a classifier: nothing that is an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values).mean((2, 3)))
