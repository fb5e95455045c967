"""Runner: one rank's model, cache, routing record and sampler. StepPlan in, StepResult out."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import batch as batches
from engine.backends.base import KVCache
from engine.masks import fill
from engine.models.decoder import Decoder
from engine.result import Sampled, StepResult
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.sampler import SamplingRow, logprobs_of, masked_rows, sample
from engine.scheduler import Chunk, StepPlan
from engine.trace import expert_visits, trace
from engine.types import TokenLogprobs

# Rows of vocabulary logits made at once while a prompt is scored: bounds their memory (V float32 a row).
_SCORED_ROWS = 256


class Runner:
    """Owns the paged cache and the steering table, and runs the model on plans."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        steering: SteeringTable,
        *,
        record: RoutingRecord | None = None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.cache = cache
        self.steering = steering
        self.record = record
        self.eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's tokens, sample where a chunk ends its sequence, report what requests asked for."""
        device = self.model.backend.device
        batch = batches.build(plan, block_size=self.cache.block_size, steering=self.steering, device=device)
        hidden = self.model.forward(batch, self.cache, self.record)
        indices = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
        sampled: dict[int, Sampled] = {}
        failed: dict[int, str] = {}
        if indices:
            tokens, errors = self._sample(self.model.logits(hidden, batch.logits_indices), plan, indices)
            failed = {indices[row]: error for row, error in errors.items()}
            sampled = {index: token for index, token in zip(indices, tokens, strict=True) if index not in failed}
        scores = self._score_prompts(plan, hidden)
        if self.record is None:
            return StepResult(sampled, scores, failed=failed)
        reports = trace(plan, self.record, batch), expert_visits(plan, self.record, batch)
        self.record.reduce(batch.routing)  # last: a step that runs out of memory does not count
        return StepResult(sampled, scores, *reports, failed=failed)

    @staticmethod
    def is_out_of_memory(error: RuntimeError) -> bool:
        """Whether `error` says that device or host memory ran out. The CPU allocator has no exception type of its
        own, only its name in the message.
        """
        return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

    def _sample(self, logits: Tensor, plan: StepPlan, indices: list[int]) -> tuple[list[Sampled], dict[int, str]]:
        """A token for each row of `logits`, the chunks `indices` of the plan; and what went wrong, by row."""
        rows = [self._sampling_row(plan.chunks[index]) for index in indices]
        masked = masked_rows(rows)
        if not masked:
            return sample(logits, rows), {}
        masks, failed = fill(masked, vocab_size=logits.shape[-1], device=logits.device)
        return sample(logits, rows, masks), failed

    def _sampling_row(self, chunk: Chunk) -> SamplingRow:
        sequence = chunk.sequence
        params = sequence.request.params
        end_ids = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self.eos_token_ids)
        return SamplingRow(
            params=params,
            seed=sequence.seed,
            prompt_ids=sequence.request.prompt_ids,
            output_ids=sequence.token_ids[sequence.num_prompt :],
            end_ids=end_ids,
            matcher=sequence.matcher,
        )

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """For each chunk that scores: log probabilities of the prompt tokens after its tokens.

        The token at position p is predicted by the hidden state at p - 1: a chunk of positions [4, 8) of a prompt of
        7 tokens scores positions 5 and 6.
        """
        scores: dict[int, list[TokenLogprobs]] = {}
        first = 0
        for index, chunk in enumerate(plan.chunks):
            sequence, num_top = chunk.sequence, chunk.sequence.request.params.prompt_logprobs
            if num_top is not None:
                end = min(chunk.start + chunk.num_tokens, sequence.num_prompt - 1)
                scored: list[TokenLogprobs] = []
                for start in range(chunk.start, end, _SCORED_ROWS):
                    stop = min(start + _SCORED_ROWS, end)
                    rows = hidden[first + start - chunk.start : first + stop - chunk.start]
                    targets = sequence.token_ids[start + 1 : stop + 1]
                    scored += logprobs_of(self.model.logits(rows), targets, num_top)
                scores[index] = scored
            first += chunk.num_tokens
        return scores
