"""An executor without a model: its cache holds, in every slot, which beginning of which text the slot stands for.

The next token is a function of all tokens before it, read through the block table as attention would read it. So a
block that is shared wrongly, freed too early, overwritten or never computed is seen at once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.executor import OutOfDeviceMemoryError
from engine.result import Sampled, StepResult
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence, Status
from engine.types import Request, TokenLogprobs
from tests.engine.infos import engine_info

VOCAB_SIZE = 3
"""Few tokens, so that answers begin alike by chance and share blocks."""


class CacheExecutor:
    """`on_plan` sees every plan before it is computed; `fail_next` makes the next step run out of memory half way
    through its forward pass, `fail_sampling` when it is sampled.

    With `runs_ahead`, the tokens of the step before are known here when a step begins, and to the core when it is
    sampled.
    """

    def __init__(
        self, block_size: int, *, on_plan: Callable[[StepPlan], None] | None = None, runs_ahead: bool = False
    ) -> None:
        self.block_size = block_size
        self.on_plan = on_plan
        self.runs_ahead = runs_ahead
        self.fail_next = False
        self.fail_sampling = False
        self.plans: list[StepPlan] = []
        self.num_computed = 0
        self._slots: dict[int, int] = {}
        self._texts: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}  # the last step's tokens, by the sequence's arrival

    def forward(self, plan: StepPlan) -> CacheStep:
        if self.on_plan is not None:
            self.on_plan(plan)
        self.plans.append(plan)
        assert self.runs_ahead or not any(chunk.has_pending for chunk in plan.chunks)
        self._write(plan)
        if self.fail_next:
            self.fail_next = False
            raise OutOfDeviceMemoryError("no room")
        self.num_computed += plan.num_tokens
        sampled: dict[int, int] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for index, chunk in enumerate(plan.chunks):
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            self._check_reads(chunk, end)
            if chunk.samples:
                sampled[index] = next_token(self._slots[self._slot(sequence, end - 1)])
            if sequence.request.params.prompt_logprobs is not None:
                scored = range(chunk.start + 1, min(end + 1, sequence.num_prompt))
                prompt_logprobs[index] = [score(sequence.token_ids[p], p) for p in scored]
        self._last = {plan.chunks[index].sequence.arrival: token_id for index, token_id in sampled.items()}
        known = [len(chunk.sequence.token_ids) + chunk.has_pending for chunk in plan.chunks]
        return CacheStep(self, plan, sampled, prompt_logprobs, known)

    def peak_memory_bytes(self) -> int:
        return 0

    def routing_record(self) -> None:
        return None

    def _write(self, plan: StepPlan) -> None:
        """All slots of the step, before any is read, as a layer does it. A step that fails leaves nonsense."""
        written: set[int] = set()
        for chunk in plan.chunks:
            text = self._text(chunk)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                slot = self._slot(chunk.sequence, position)
                assert slot not in written, "two tokens of a step have the same slot"
                written.add(slot)
                self._slots[slot] = -1 if self.fail_next else text[position]

    def _check_reads(self, chunk: Chunk, end: int) -> None:
        sequence, text = chunk.sequence, self._text(chunk)
        for position in range(end):
            found = self._slots.get(self._slot(sequence, position))
            assert found == text[position], f"position {position} of {sequence} is not in the cache"

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _text(self, chunk: Chunk) -> list[int]:
        """For each position of the chunk's sequence, a pending one included, what its slot must hold."""
        sequence = chunk.sequence
        text = self._texts.setdefault(sequence.arrival, [])
        for token_id in sequence.token_ids[len(text) :]:
            text.append(extend(text[-1] if text else beginning(sequence.request), token_id))
        return text if not chunk.has_pending else [*text, extend(text[-1], self._last[sequence.arrival])]


@dataclass(frozen=True)
class CacheStep:
    executor: CacheExecutor
    plan: StepPlan
    sampled: dict[int, int]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    known: list[int]
    """Tokens of each chunk's sequence, the pending one included, that must be known when it is sampled."""
    passed_over: set[int] = field(default_factory=set)

    def sample(self) -> None:
        if self.executor.fail_sampling:
            self.executor.fail_sampling = False
            raise OutOfDeviceMemoryError("no room")
        for index, (chunk, known) in enumerate(zip(self.plan.chunks, self.known, strict=True)):
            if chunk.sequence.status is Status.FINISHED:
                self.passed_over.add(index)
            else:
                assert len(chunk.sequence.token_ids) == known

    def result(self) -> StepResult:
        tokens = {index: Sampled(token_id, None) for index, token_id in self.sampled.items()}
        return StepResult(
            {index: tokens[index] for index in tokens if index not in self.passed_over}, self.prompt_logprobs
        )


def beginning(request: Request) -> int:
    return zlib.crc32(repr((request.cache_salt, request.steering)).encode())


def extend(text: int, token_id: int) -> int:
    return zlib.crc32(struct.pack("<I", token_id), text)


def next_token(text: int) -> int:
    return (text >> 7) % VOCAB_SIZE


def score(token_id: int, position: int) -> TokenLogprobs:
    """A log probability that tells its position."""
    return TokenLogprobs(token_id, -float(position), 1)


def expected_answer(request: Request, max_model_len: int) -> list[int]:
    """What CacheExecutor answers to `request` when it is alone, computed without any cache."""
    text = beginning(request)
    for token_id in request.prompt_ids:
        text = extend(text, token_id)
    limit = max_model_len - len(request.prompt_ids)
    answer: list[int] = []
    while len(answer) < min(limit, request.params.max_tokens if request.params.max_tokens is not None else limit):
        answer.append(next_token(text))
        text = extend(text, answer[-1])
        if answer[-1] in request.params.stop_token_ids:
            break
    return answer


def make_core(
    executor: CacheExecutor,
    *,
    num_blocks: int,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    enable_prefix_caching: bool = True,
) -> EngineCore:
    """A core over `executor` without end-of-sequence ids, whose longest sequence fills the cache."""
    info = engine_info(
        vocab_size=VOCAB_SIZE,
        max_model_len=num_blocks * executor.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=executor.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=enable_prefix_caching,
        record_routing=False,
    )
    return EngineCore(executor, info)
