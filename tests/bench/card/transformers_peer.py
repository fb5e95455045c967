"""transformers generates, on random weights made on the device; the last line of output is JSON: its times in seconds.

python transformers_peer.py FOLDER DEVICE BATCH INPUT_LEN OUTPUT_LEN ROUNDS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers

from tests.bench.card.prompts import prompt

COUNTED_TOKENS = 8
"""Of an answer, during which experts are counted; no time is taken then."""


def main(folder: str, device: str, batch: int, input_len: int, output_len: int, rounds: int) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    prompts = [prompt(f"prompt {index}", input_len, config.vocab_size) for index in range(batch)]
    ids = torch.tensor(prompts, device=device)

    def generate(num_tokens: int) -> float:
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        assert made.shape == (batch, input_len + num_tokens)  # a look at the result waits for it
        made.cpu()
        return time.perf_counter() - start

    generate(output_len)
    first, whole = [], []
    for _ in range(rounds):
        first.append(generate(1))
        whole.append(generate(output_len))
    distinct = count_experts(model, batch, lambda: generate(min(COUNTED_TOKENS, output_len)))
    found = {
        "version": transformers.__version__,
        "attention": config._attn_implementation,
        "experts": config._experts_implementation,
        "first": first,
        "whole": whole,
        "distinct_experts": distinct,
    }
    print(json.dumps(found))


def count_experts(model: Any, batch: int, run: Any) -> float:
    """Experts that a decode step reaches in a layer, on average, by what the routers return."""
    counts: list[int] = []

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        *_, indices = output
        if indices.shape[0] == batch:  # a decode step: one row a sequence
            counts.append(len(indices.unique()))

    hooks = [
        module.register_forward_hook(look)
        for name, module in model.named_modules()
        if type(module).__name__ == "MixtralTopKRouter"
    ]
    run()
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


if __name__ == "__main__":
    name, place, *sizes = sys.argv[1:]
    with torch.inference_mode():
        main(name, place, *map(int, sizes))
