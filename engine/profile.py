"""The peak memory of a step on a GPU, measured by running the largest ones that the options allow."""

from __future__ import annotations

import torch

from engine.backends.base import KVCache
from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.types import Request, SamplingParams
from weights.config import ModelConfig

# Sorting the vocabulary is what takes most: every row asks for it.
_PARAMS = SamplingParams(top_p=0.9, logprobs=20)


def measure_activations(
    model: Decoder,
    config: EngineConfig,
    model_config: ModelConfig,
    record: RoutingRecord | None,
    *,
    max_num_batched_tokens: int,
    max_model_len: int,
) -> int:
    """Bytes that the largest step takes beside weights and cache.

    Two steps of `max_num_batched_tokens` tokens are run: as many sequences as may run, every one of them sampled, and
    one chunk at the end of a context of `max_model_len`. They read and write one block, over and over: what is in it
    does not matter.
    """
    cache = model.backend.new_kv_cache(model_config.num_layers, 1, config.block_size, model.attention_shape)
    budget = max_num_batched_tokens
    num_seqs = min(config.max_num_seqs, budget)
    lengths = [min(budget // num_seqs + (index < budget % num_seqs), max_model_len) for index in range(num_seqs)]
    many = StepPlan(tuple(_chunk(index, 0, length, config.block_size) for index, length in enumerate(lengths)))
    last = min(budget, max_model_len)
    long = StepPlan((_chunk(0, max_model_len - last, last, config.block_size),))
    steering = SteeringTable.for_model(model_config, num_slots=1, device=model.backend.device)
    peak = max(_peak(model, cache, steering, record, plan) for plan in (many, long))
    if record is not None:
        record.reset()  # this was no traffic
    return peak


def _chunk(index: int, start: int, num_tokens: int, block_size: int) -> Chunk:
    """A chunk that ends its sequence, so that it is sampled, all of whose blocks are block 0."""
    request = Request(request_id=str(index), prompt_ids=(0,) * (start + num_tokens), params=_PARAMS)
    sequence = Sequence(request, arrival=index, seed=index)
    sequence.num_computed = start
    sequence.block_table = [0] * -(-sequence.num_tokens // block_size)
    return Chunk(sequence, start, num_tokens)


def _peak(model: Decoder, cache: KVCache, steering: SteeringTable, record: RoutingRecord | None, plan: StepPlan) -> int:
    device = model.backend.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    Runner(model, cache, steering, record=record, eos_token_ids=frozenset()).run(plan)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what the allocator keeps would be taken for memory in use, and counted twice
    return peak
