"""What pruning, merging and splitting the experts of a mixture costs, on a small one that is trained here first.

    python -m bench.mixtures [--steps 600] [--only TEXT …]

A Mixtral of 4 layers and 8 experts, 2 of them a token, learns to predict the bytes of the packaged text (ten minutes on a slow core; it
is kept in the cache folder). Each row is a list of passes on it, fitted to text that it was trained on and measured on text that it was
not. It is small, and its experts are what so little text makes of them: the order of the rows tells something, their size little.
"""

from __future__ import annotations

import argparse
import math
import time

import dyncomp.passes  # noqa: F401  (registers them by name)
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.tiny import TokenModel
from dyncomp.cache import cache_folder
from dyncomp.calibrate import Calibration
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.text import load_text, split
from dyncomp.trace import trace

LENGTH, BATCH, RATE, BALANCE = 128, 16, 2e-3, 0.02
CALIBRATION, EVALUATION = 128, 64  # windows
ROWS = (
    "drop-experts{keep=75%}", "drop-experts{keep=50%}", "drop-experts{keep=50% choose=random}",
    "merge-experts{experts=6}", "merge-experts{experts=4}", "merge-experts{experts=4 groups=random}",
    "split-experts{active=75%}", "split-experts{active=50%}", "split-experts{active=50% cluster=random}",
    "quantize{bits=4}", "quantize{bits=4 method=gptq}",
)  # fmt: skip


def new_model() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=LENGTH, num_local_experts=8, num_experts_per_tok=2, use_cache=False, router_aux_loss_coef=BALANCE,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def train(model: nn.Module, data: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator, started = torch.Generator().manual_seed(1), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = windows(data, torch.randint(len(data) - LENGTH, (BATCH,), generator=generator))
        loss = model(input_ids=rows, labels=rows, output_router_logits=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}: {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def windows(data: Tensor, starts: Tensor) -> Tensor:
    """[n, LENGTH] int64"""
    return data[starts[:, None] + torch.arange(LENGTH)].long()


def spaced(data: Tensor, count: int) -> Tensor:
    return windows(data, torch.linspace(0, len(data) - LENGTH, count).long())


def trained(steps: int, data: Tensor) -> nn.Module:
    """The model, trained now or before."""
    model, file = new_model(), cache_folder() / f"bench-mixture-{steps}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        train(model.train(), data, steps)
        save_file(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def measure(graph: Graph, rows: Tensor, dense: Tensor) -> tuple[float, float, float]:
    """(bits per byte, KL divergence from the trained model in bits, the same most likely byte)"""
    logits = torch.cat([graph(part) for part in rows.split(BATCH)]).log_softmax(-1)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    kl = (dense.exp() * (dense - logits)).sum(-1).mean()
    return float(loss) / math.log(2), float(kl) / math.log(2), float((logits.argmax(-1) == dense.argmax(-1)).float().mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", default=[""], help="rows that contain one of these")
    chosen = parser.parse_args(arguments)
    learnt, unseen = (torch.frombuffer(bytearray("\n".join(c.documents).encode()), dtype=torch.uint8) for c in split(load_text()))
    model = trained(chosen.steps, learnt)
    ids, evaluated = spaced(learnt, CALIBRATION), spaced(unseen, EVALUATION)
    graph = trace(
        TokenModel(model, "logits"), {"input_ids": ids[:2]}, {"input_ids": {0: "batch", 1: "sequence"}}, info={"task": "causal-lm"}
    )
    calibration = Calibration([{"input_ids": part} for part in ids.split(BATCH)], "bench.mixtures")
    with torch.no_grad():
        dense = torch.cat([graph(part) for part in evaluated.split(BATCH)]).log_softmax(-1)
    print(f"{'passes':44}  bits/byte  KL, bits  same byte  parameters")
    for spec in ("", *(row for row in ROWS if any(text in row for text in chosen.only))):
        changed = graph.copy()
        Pipeline(parse_passes(spec)).run(changed, Context(calibration, dense=graph)) if spec else None
        loss, kl, same = measure(changed, evaluated, dense)
        print(f"{spec or 'as trained':44}  {loss:9.4f}  {kl:8.4f}  {same:9.1%}  {changed.parameter_count():10,}", flush=True)


if __name__ == "__main__":
    main()
