"""Mixture-of-Depths trained from scratch, beside a dense model of equal FLOPs (2404.02258).

python examples/train_mod.py [--steps 350] [--text FILE]

Two small language models of bytes see the same text in the same order. One is dense. In the other every second block computes an
eighth of the tokens of a sequence only, those its router scores highest, and is skipped by the rest; for the FLOPs it saves it has
more blocks. A choice among all tokens of a sequence looks ahead, so a small predictor learns beside it, from each token alone, whether
the token will be chosen: with it the model could generate text, and is measured a second time.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncomp.text import load_text, split

WIDTH, HEADS, LENGTH, BATCH = 128, 4, 256, 16
CAPACITY = 0.125
HEAD_FLOPS = 2 * WIDTH * 256  # per token


class Block(nn.Module):
    """Attention and FFN before norms; gives what it adds to x [B, S, d]. Positions are in x: the tokens may be any, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        added = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return added + self.down(F.gelu(self.up(self.norms[1](x + added))))

    @staticmethod
    def flops(tokens: float) -> float:
        """Of one sequence of so many tokens, forward."""
        return tokens * 2 * 12 * WIDTH**2 + 2 * tokens**2 * WIDTH


class Skipped(nn.Module):
    """A block that computes the tokens its router chooses: x + score * block(chosen tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.router = Block(), nn.Linear(WIDTH, 1)
        self.predictor = nn.Sequential(nn.Linear(WIDTH, WIDTH // 4), nn.ReLU(), nn.Linear(WIDTH // 4, 1))
        self.predicts = False
        self.loss, self.right, self.share = torch.zeros(()), 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        scores, guess = self.router(x).squeeze(-1), self.predictor(x.detach()).squeeze(-1)
        best = scores.topk(max(1, round(CAPACITY * x.shape[1])), sorted=False).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, value=True)
        self.loss = F.binary_cross_entropy_with_logits(guess, chosen.float())
        self.right = float(((guess > 0) == chosen).float().mean())
        if self.predicts:
            chosen = guess > 0
        self.share = float(chosen.float().mean())
        if not self.predicts:  # the same number in each sequence
            rows = best.sort().values
            taken = x.gather(1, rows[..., None].expand(-1, -1, WIDTH))
            added = self.block(taken) * scores.gather(1, rows)[..., None]
            return x.scatter_add(1, rows[..., None].expand_as(added), added)
        return torch.stack([self._one(*row) for row in zip(x, scores, chosen, strict=True)])

    def _one(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        rows = chosen.nonzero().squeeze(-1)
        return x.index_add(0, rows, self.block(x[None, rows])[0] * scores[rows, None]) if len(rows) else x

    @staticmethod
    def flops(tokens: float) -> float:
        return Block.flops(max(1, round(CAPACITY * tokens))) + tokens * 2 * (WIDTH + WIDTH**2 // 4)


class Model(nn.Module):
    """Bytes [B, S] -> logits [B, S, 256]."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.skipped = [b for b in blocks if isinstance(b, Skipped)]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x) if isinstance(block, Skipped) else x + block(x)
        return self.head(self.norm(x))

    def flops(self) -> float:
        """Per token, forward."""
        return sum(b.flops(LENGTH) for b in self.blocks) / LENGTH + HEAD_FLOPS


def dense(depth: int) -> Model:
    return Model([Block() for _ in range(depth)])


def mixture(flops: float) -> Model:
    """Full and skipped blocks in turn, as many as these FLOPs allow."""
    pair = (Block.flops(LENGTH) + Skipped.flops(LENGTH)) / LENGTH
    pairs = max(1, int((flops - HEAD_FLOPS) / pair))
    return Model([kind() for _ in range(pairs) for kind in (Block, Skipped)])


def train(model: Model, data: Tensor, steps: int, seed: int) -> float:
    """Returns the seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
        rows = data[starts[:, None] + torch.arange(LENGTH + 1)].long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        for block in model.skipped:
            loss = loss + block.loss / len(model.skipped)  # reaches the predictors only
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: {loss.item():.3f}", flush=True)
    return time.perf_counter() - started


@torch.no_grad()
def bits_per_byte(model: Model, data: Tensor) -> tuple[float, float]:
    """(bits per byte on windows of held-out text, seconds for it)"""
    count = min(64, (len(data) - 1) // LENGTH)
    starts, losses, started = torch.arange(count) * LENGTH, [], time.perf_counter()
    for part in starts.split(BATCH):
        rows = data[part[:, None] + torch.arange(LENGTH + 1)].long()
        losses.append(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean()) / math.log(2), time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--depth", type=int, default=8, help="blocks of the dense model")
    parser.add_argument("--text", help="wikipedia, news, or a file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    training, held_out = (
        torch.frombuffer(bytearray("\n".join(part.documents).encode()), dtype=torch.uint8) for part in split(load_text(options.text))
    )
    rows = []
    torch.manual_seed(options.seed)
    plain = dense(options.depth)
    cpu = time.process_time()
    for name, model in (("dense", plain), ("Mixture-of-Depths", mixture(plain.flops()))):
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {len(model.blocks)} blocks, {size / 1e6:.1f} M parameters, {model.flops() / 1e6:.2f} MFLOPs a token", flush=True)
        seconds = train(model, training, options.steps, options.seed)
        bits, forward = bits_per_byte(model, held_out)
        rows.append((name, seconds, bits, forward))
        if model.skipped:
            for block in model.skipped:
                block.predicts = True
            bits, forward = bits_per_byte(model, held_out)
            rows.append(("… tokens as predicted", math.nan, bits, forward))
            right = sum(b.right for b in model.skipped) / len(model.skipped)
            share = sum(b.share for b in model.skipped) / len(model.skipped)
            print(f"predictors: right about {right:.1%} of the tokens (always no: {1 - CAPACITY:.1%}), {share:.1%} chosen")
    print(f"\n{'':24}{'training, s':>12}{'bits per byte':>15}{'forward, s':>12}")
    for name, seconds, bits, forward in rows:
        print(f"{name:24}{'' if math.isnan(seconds) else f'{seconds:.0f}':>12}{bits:15.3f}{forward:12.2f}")
    print(f"{(time.process_time() - cpu) / 60:.1f} CPU minutes, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
