"""The peak memory of a step on a GPU, measured by running the largest one that the options allow."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.types import Request, SamplingParams
from weights.config import ModelConfig


def measure_activations(model: Decoder, config: EngineConfig, model_config: ModelConfig) -> int:
    """Bytes that a full step takes beside weights and cache: `max_num_batched_tokens` tokens in as many sequences as
    may run, every one of them sampled. The cache it needs is made for the occasion and given back.
    """
    device = model.backend.device
    budget = config.max_num_batched_tokens
    num_seqs = min(config.max_num_seqs, budget)
    longest = -(-budget // num_seqs)
    blocks_each = -(-longest // config.block_size)
    cache = model.backend.new_kv_cache(
        model_config.num_layers, num_seqs * blocks_each, config.block_size, model.attention_shape
    )
    chunks = []
    for index in range(num_seqs):
        length = budget // num_seqs + (index < budget % num_seqs)
        ids = tuple((index + offset) % model_config.vocab_size for offset in range(length))
        request = Request(request_id=str(index), prompt_ids=ids, params=SamplingParams(top_p=0.9, seed=index))
        sequence = Sequence(request, arrival=index, seed=index)
        sequence.block_table = list(range(index * blocks_each, (index + 1) * blocks_each))
        chunks.append(Chunk(sequence, 0, length))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    Runner(model, cache, eos_token_ids=frozenset()).run(StepPlan(tuple(chunks)))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del cache
    torch.cuda.empty_cache()
    return peak
