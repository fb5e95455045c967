"""Runner: one rank's model, cache, routing record and sampler. StepPlan in, a step under way out.

A step has three parts, so that the next one can begin before this one's tokens are known: the forward pass, which
takes pending tokens from the device; sampling, which needs to know of all tokens before (penalties, grammars); and the
result. Nothing waits for the device but the last.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engine import batch as batches
from engine.backends.base import KVCache
from engine.batch import LastTokens
from engine.decode_graphs import DecodeGraphs, StepTensors
from engine.masks import fill
from engine.models.decoder import Decoder
from engine.result import StepResult
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.sampler import SamplingRow, logprobs_of, masked_rows, sample
from engine.samples import Logprobs, Samples
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Status
from engine.trace import Traces, Visits, expert_visits, trace
from engine.transfers import Arrival, to_device

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
        graphs: DecodeGraphs | None = None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.cache = cache
        self.steering = steering
        self.record = record
        self.graphs = graphs
        self.eos_token_ids = eos_token_ids
        self.last_tokens: LastTokens | None = None

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Step:
        """Begin to compute the plan's tokens. The step before must have been sampled."""
        build = partial(batches.build, plan, block_size=self.cache.block_size, steering=self.steering)
        if self.graphs is not None and self.graphs.fit(plan):
            return Step(self, plan, self.graphs.forward(plan, build(device=torch.device("cpu")), self.last_tokens))
        batch = build(device=self.model.backend.device)
        if self.last_tokens is not None:
            self.last_tokens.fill_pending(plan, batch.input_ids)
        hidden = self.model.forward(batch, self.cache, self.record)
        samples = any(chunk.samples for chunk in plan.chunks)
        logits = self.model.logits(hidden, batch.logits_indices) if samples else None
        return Step(self, plan, StepTensors(hidden, logits, batch.routing, recorded=False))

    def run(self, plan: StepPlan) -> StepResult:
        """A whole step."""
        step = self.forward(plan)
        step.sample()
        return step.result()

    @staticmethod
    def is_out_of_memory(error: RuntimeError) -> bool:
        """Whether `error` says that device or host memory ran out. The CPU's allocator, and CUDA where it is not asked
        by torch's (pinned memory, the launch of a graph), have no exception type of their own, only their messages.
        """
        said = ("DefaultCPUAllocator", "CUDA error: out of memory")
        return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in said)


class Step:
    """A step under way. The next forward pass may overwrite what it left on the device, so everything that is told of
    it is on its way to the host when `sample` returns.
    """

    def __init__(self, runner: Runner, plan: StepPlan, tensors: StepTensors) -> None:
        self._runner = runner
        self._plan = plan
        self._tensors: StepTensors | None = tensors
        self._indices: list[int] = []
        self._samples: Samples | None = None
        self._failed: dict[int, str] = {}
        self._scores: dict[int, list[Logprobs]] = {}
        self._traces: Traces | None = None
        self._visits: Visits | None = None
        self._arrival: Arrival | None = None

    @torch.inference_mode()
    def sample(self) -> None:
        """Choose tokens where a chunk ends its sequence, and collect what requests asked for. Whoever has ended since
        the step was planned is passed over.
        """
        plan, record, tensors = self._plan, self._runner.record, self._tensors
        assert tensors is not None, "it was sampled before"
        sampling = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
        rows = [row for row, index in enumerate(sampling) if not _has_ended(plan.chunks[index])]
        self._indices = [sampling[row] for row in rows]
        if rows:
            logits = tensors.logits
            assert logits is not None
            if len(rows) < len(sampling):
                logits = logits.index_select(0, to_device(rows, torch.int64, logits.device))
            samples = self._choose(logits)
            owners = {plan.chunks[index].sequence.arrival: row for row, index in enumerate(self._indices)}
            self._runner.last_tokens = LastTokens(samples.token_ids, owners)
            self._samples = samples.to_host()
        self._score_prompts(tensors.hidden)
        if record is not None:
            self._traces = trace(plan, record, tensors.routing.max_top_k)
            self._visits = expert_visits(plan, record, tensors.routing.max_top_k)
            if not tensors.recorded:
                record.reduce(tensors.routing)  # last: a step that runs out of memory does not count
        self._arrival = Arrival(tensors.hidden.device)
        self._tensors = None  # their memory is the next step's

    def result(self) -> StepResult:
        """What the step found; waits for the device."""
        assert self._arrival is not None, "it was not sampled"
        self._arrival.wait()
        sampled = [] if self._samples is None else self._samples.read()
        return StepResult(
            sampled={i: token for i, token in zip(self._indices, sampled, strict=True) if i not in self._failed},
            prompt_logprobs={
                index: [entry for scores in parts for entry in scores.read()] for index, parts in self._scores.items()
            },
            routing={} if self._traces is None else self._traces.read(),
            expert_visits={} if self._visits is None else self._visits.read(),
            failed=self._failed,
        )

    def _choose(self, logits: Tensor) -> Samples:
        """A token for each row of `logits`; grammars that cannot be followed are noted."""
        rows = [self._sampling_row(self._plan.chunks[index]) for index in self._indices]
        masked = masked_rows(rows)
        if not masked:
            return sample(logits, rows)
        masks, failed = fill(masked, vocab_size=logits.shape[-1], device=logits.device)
        self._failed = {self._indices[row]: error for row, error in failed.items()}
        return sample(logits, rows, masks)

    def _sampling_row(self, chunk: Chunk) -> SamplingRow:
        sequence = chunk.sequence
        params = sequence.request.params
        end_ids = params.stop_token_ids
        if not params.ignore_eos:
            end_ids = (*end_ids, *self._runner.eos_token_ids)
        return SamplingRow(
            params=params,
            seed=sequence.seed,
            prompt_ids=sequence.request.prompt_ids,
            output_ids=sequence.token_ids[sequence.num_prompt :],
            end_ids=end_ids,
            matcher=sequence.matcher,
        )

    def _score_prompts(self, hidden: Tensor) -> None:
        """For each chunk that scores: log probabilities of the prompt tokens after its tokens.

        The token at position p is predicted by the hidden state at p - 1: a chunk of positions [4, 8) of a prompt of
        7 tokens scores positions 5 and 6.
        """
        first = 0
        for index, chunk in enumerate(self._plan.chunks):
            sequence, num_top = chunk.sequence, chunk.sequence.request.params.prompt_logprobs
            if num_top is not None:
                end = min(chunk.start + chunk.num_tokens, sequence.num_prompt - 1)
                self._scores[index] = []
                for start in range(chunk.start, end, _SCORED_ROWS):
                    stop = min(start + _SCORED_ROWS, end)
                    rows = hidden[first + start - chunk.start : first + stop - chunk.start]
                    logits = self._runner.model.logits(rows)
                    targets = sequence.token_ids[start + 1 : stop + 1]
                    self._scores[index].append(logprobs_of(logits, targets, num_top).to_host())
            first += chunk.num_tokens


def _has_ended(chunk: Chunk) -> bool:
    return chunk.sequence.status is Status.FINISHED
