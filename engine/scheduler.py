"""Scheduler: which tokens of which sequences are computed in the next step. No tensors.

Continuous batching (Yu et al. 2022, "Orca") under a token budget a step, with chunked prefill (Agrawal et al. 2023,
arXiv 2308.16369): running decodes get their token first, prompts share what is left of the budget, so a long prompt
never holds up a decode. Within each group the order is (priority, arrival), and the first in that order can always
make room by preempting the last: it is never stuck.

A step may be planned while the one before is computed: who is sampled there decodes here, with a pending token, unless
that token is its last.

Short prompts need not wait for one that takes several steps: beside it, up to half of what decodes leave is kept for
prompts that fit into it whole. Example, budget 100, a prompt of 4,000 tokens running, prompts of 200 and 30
waiting: the step computes 70 tokens of the first and all 30 of the last.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of `sequence` are computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool = field(init=False)
    """Whether it ends with the sequence's last token, so that the next one can be sampled."""
    has_pending: bool = field(init=False)
    """Whether that last token is still to be sampled by the step before."""

    def __post_init__(self) -> None:
        """What the sequence says now: it goes on while the step is computed."""
        samples = self.start + self.num_tokens == self.sequence.num_tokens
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "has_pending", samples and self.sequence.num_pending > 0)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work: decodes first, then prompt chunks."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Holds all live sequences. `waiting` and `running` are kept in (priority, arrival) order."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        # A running decode costs a token of every step, so more of them than the budget could not all advance.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.order)

    def finish(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Take a sequence out, at any moment between steps, and free its blocks. With `failed`, a step that it was in
        was not computed, and so perhaps not what others published there, which it may hold as its beginning.
        """
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        if not failed:
            self.blocks.publish(sequence, sequence.num_computed)  # a last full block that ended with a pending token
        self.blocks.free(sequence)
        sequence.status = Status.FINISHED

    def schedule(self) -> StepPlan:
        """Plan the next step: grants blocks, preempts where they run out, and admits what fits."""
        step = _Step(self.max_num_batched_tokens)
        for sequence in [s for s in self.running if s.num_remaining == 1]:
            self._continue(sequence, step)
        self._keep_for_short(step)
        for sequence in [s for s in self.running if s.num_remaining > 1]:
            self._continue(sequence, step)
        if not step.short_of_blocks:
            self._admit(step)
            self._serve_short(step)
        chunks = tuple(step.chunks.values())
        for chunk in chunks:
            assert chunk.sequence.status is Status.RUNNING
        return StepPlan(chunks)

    def _keep_for_short(self, step: _Step) -> None:
        """Set a part of the step aside for short prompts behind one that is longer than it.

        Only for such as can come in without taking a block from those that run, or a block or place from the first that
        waits.
        """
        running = [sequence for sequence in self.running if sequence.num_remaining > 1]
        places = self.max_num_seqs - len(self.running) - 1
        blocks = self.blocks.num_free - sum(self.blocks.num_needed(s, s.num_tokens) for s in self.running)
        blocks -= sum(self.blocks.num_needed(s, s.num_tokens) for s in self.waiting[:1])
        budget, before = step.budget, 0
        left: int | None = None  # until there is a long one
        for index, sequence in enumerate(running + ([] if step.short_of_blocks else self.waiting)):
            if sequence.num_remaining > budget:
                left = max(0, budget - before) // 2 if left is None else left
            elif left is None:
                before += sequence.num_remaining
            elif sequence.num_remaining <= left:
                needed = 0
                if index > len(running):  # the first that waits is counted
                    needed = self.blocks.blocks_for(sequence.num_tokens)
                    places -= 1
                if index >= len(running) and (places < 0 or needed > blocks):
                    continue
                blocks -= needed
                left -= sequence.num_remaining
                step.keep(sequence, sequence.num_remaining)

    def _serve_short(self, step: _Step) -> None:
        """Let in those for whom a part is still kept, past longer ones that wait."""
        for sequence in step.kept():
            assert sequence.status is Status.WAITING, "who runs had its turn"
            others = self.waiting[:1] if sequence is not self.waiting[0] else []  # others may have come in since
            needed = self.blocks.blocks_for(sequence.num_tokens)
            needed += sum(self.blocks.num_needed(other, other.num_tokens) for other in others)
            if needed <= self.blocks.num_free and len(self.running) + len(others) < self.max_num_seqs:
                self._let_in(sequence, self.blocks.find_prefix(sequence), step)

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        """Give a running sequence its tokens of this step; take blocks from the last in order when none is free."""
        step.give_back(sequence)
        num_tokens = min(sequence.num_remaining, step.budget)
        if num_tokens == 0 or sequence.status is not Status.RUNNING:
            return
        end = sequence.num_computed + num_tokens
        while self.blocks.num_needed(sequence, end) > self.blocks.num_free:
            victim = self.running[-1]
            if victim is sequence:
                step.short_of_blocks = True
                return  # everyone before it goes first; it keeps its blocks and waits a step
            self._preempt(victim, step)
        self._grant(sequence, num_tokens, step)

    def _admit(self, step: _Step) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            step.give_back(sequence)
            if not step.budget:
                return
            prefix = self.blocks.find_prefix(sequence)
            # All its known tokens must fit, not only this step's chunk: a prompt that is let in half would be the
            # first to be thrown out again.
            if self.blocks.num_needed(sequence, sequence.num_tokens, prefix) > self.blocks.num_free:
                return
            self._let_in(sequence, prefix, step)

    def _let_in(self, sequence: Sequence, prefix: list[int], step: _Step) -> None:
        """Start a waiting sequence, for which there are blocks, from the cached blocks `prefix`."""
        step.give_back(sequence)
        self.waiting.remove(sequence)
        self.blocks.take_prefix(sequence, prefix)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.queue_seconds = time.monotonic() - sequence.added_at
            sequence.num_cached = sequence.num_computed
            self.blocks.record_query(sequence.num_tokens, sequence.num_cached)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda s: s.order)
        self._grant(sequence, min(sequence.num_remaining, step.budget), step)

    def _grant(self, sequence: Sequence, num_tokens: int, step: _Step) -> None:
        end = sequence.num_computed + num_tokens
        self.blocks.grow(sequence, end)
        self.blocks.publish(sequence, end)
        step.chunks[sequence.arrival] = Chunk(sequence, sequence.num_computed, num_tokens)
        step.budget -= num_tokens

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        """Throw a running sequence out: its blocks are freed and its tokens will be computed again."""
        chunk = step.chunks.pop(sequence.arrival, None)
        if chunk is not None:
            step.budget += chunk.num_tokens
            self.blocks.retract(sequence)
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = Status.WAITING
        self.add(sequence)
        self.num_preemptions += 1
        step.short_of_blocks = True


class _Step:
    """A step while it is being planned."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[int, Chunk] = {}
        # Someone was preempted or waits for blocks: what is free is not for newcomers.
        self.short_of_blocks = False
        self._kept: dict[int, tuple[Sequence, int]] = {}

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Set tokens aside until it is the sequence's turn."""
        self.budget -= num_tokens
        self._kept[sequence.arrival] = sequence, num_tokens

    def kept(self) -> list[Sequence]:
        return [sequence for sequence, _ in self._kept.values()]

    def give_back(self, sequence: Sequence) -> None:
        """Now it is: what was kept for it may be used."""
        self.budget += self._kept.pop(sequence.arrival, (sequence, 0))[1]
