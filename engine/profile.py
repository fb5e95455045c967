"""The memory that steps take on a GPU, measured by running the largest ones that the options allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.activations import MAX_GRAPH_BATCH
from engine.backends.base import KVCache
from engine.config import EngineConfig
from engine.memory import MemoryMeter
from engine.models.decoder import Decoder
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.types import Request, SamplingParams, Steering
from weights.config import ModelConfig

# Sorting the vocabulary is what takes most: every row asks for it.
_PARAMS = SamplingParams(top_p=0.9, logprobs=20)

_DECODE_CONTEXT = 4096
"""Of the decodes that are measured: with longer ones, the host would take long to make them."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes beside weights and cache."""

    step: int
    """The most that a step takes."""
    decode: int
    """The forward pass of the largest batch of decodes that a graph is captured of."""


def measure_steps(
    model: Decoder,
    cache: KVCache,
    config: EngineConfig,
    model_config: ModelConfig,
    record: RoutingRecord | None,
    meter: MemoryMeter,
    *,
    max_num_batched_tokens: int,
    max_model_len: int,
    max_choices: int,
) -> StepMemory:
    """Run steps that read and write block 0 of `cache`, over and over: what is in it does not matter.

    A small one comes first: what stays after it, like a workspace or the code of kernels, is not the steps'. Then two
    of `max_num_batched_tokens` tokens, as many sequences as may run, every one of them sampled, and one chunk at the
    end of a context of `max_model_len`; and a batch of decodes. One sequence of each asks for `max_choices` experts.
    """
    budget, block_size = max_num_batched_tokens, config.block_size
    num_seqs = min(config.max_num_seqs, budget)
    steering = Steering(experts_per_token=max_choices)

    def chunk(index: int, start: int, num_tokens: int) -> Chunk:
        return _chunk(index, start, num_tokens, block_size, steering if index == 0 else None)

    lengths = [min(budget // num_seqs + (index < budget % num_seqs), max_model_len) for index in range(num_seqs)]
    many = StepPlan(tuple(chunk(index, 0, length) for index, length in enumerate(lengths)))
    last = min(budget, max_model_len)
    long = StepPlan((chunk(0, max_model_len - last, last),))
    start = min(max_model_len, _DECODE_CONTEXT) - 1
    decodes = StepPlan(tuple(chunk(index, start, 1) for index in range(min(num_seqs, MAX_GRAPH_BATCH))))
    table = SteeringTable.for_model(model_config, num_slots=2, device=model.backend.device)
    runner = Runner(model, cache, table, record=record, eos_token_ids=frozenset())
    runner.run(StepPlan((chunk(0, 0, 1),)))
    step = max(_peak(meter, lambda plan=plan: runner.run(plan)) for plan in (many, long))  # type: ignore[misc]
    decode = _peak(meter, lambda: runner.forward(decodes))
    if record is not None:
        record.reset()  # this was no traffic
    return StepMemory(step, decode)


def _peak(meter: MemoryMeter, run: Callable[[], object]) -> int:
    meter.reset()
    before = meter.allocated()
    run()
    return meter.peak() - before


def _chunk(index: int, start: int, num_tokens: int, block_size: int, steering: Steering | None) -> Chunk:
    """A chunk that ends its sequence, so that it is sampled, all of whose blocks are block 0."""
    prompt_ids = (0,) * (start + num_tokens)
    request = Request(request_id=str(index), prompt_ids=prompt_ids, params=_PARAMS, steering=steering)
    sequence = Sequence(request, arrival=index, seed=index)
    sequence.num_computed = start
    sequence.block_table = [0] * -(-sequence.num_tokens // block_size)
    return Chunk(sequence, start, num_tokens)
