"""Block manager against a naive model of a prefix cache that knows contents and no block numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from engine.types import Steering
from tests.engine.sequences import make_sequence

Key = tuple[str | None, Steering | None, tuple[int, ...]]
"""What decides a block's contents: salt, steering, and every token up to the block's end."""


@dataclass
class Held:
    """A live sequence of the naive model: for each of its blocks the key it is known by, or None."""

    sequence: Sequence
    keys: list[Key | None] = field(default_factory=list)


class NaivePrefixCache(RuleBasedStateMachine):
    """Counts contents instead of blocks: who holds which key, which keys are free in order of release."""

    NUM_BLOCKS, BLOCK_SIZE = 7, 2
    SMALL = st.lists(st.integers(0, 1), min_size=1, max_size=9)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, self.BLOCK_SIZE)
        self.live: list[Held] = []
        self.holders: Counter[Key] = Counter()
        self.released: list[Key] = []  # known, held by nobody, oldest first
        self.num_unknown = 0  # blocks that somebody holds and nobody finds
        self.slots: dict[tuple[int, int], Key] = {}  # what a computed position really holds
        self.arrivals = 0

    def key(self, sequence: Sequence, end: int) -> Key:
        return sequence.request.cache_salt, sequence.request.steering, tuple(sequence.token_ids[:end])

    def expected_prefix(self, sequence: Sequence) -> list[Key]:
        found: list[Key] = []
        while (end := (len(found) + 1) * self.BLOCK_SIZE) < sequence.num_tokens:
            key = self.key(sequence, end)
            if not self.holders[key] and key not in self.released:
                break
            found.append(key)
        return found

    @property
    def expected_free(self) -> int:
        return self.NUM_BLOCKS - self.num_unknown - sum(1 for count in self.holders.values() if count)

    def take_blocks(self, held: Held, count: int) -> None:
        for _ in range(count):
            if self.expected_free == len(self.released):
                self.released.pop(0)  # nothing is blank: the oldest known block gives way
            self.num_unknown += 1
            held.keys.append(None)

    def publish(self, held: Held, end: int) -> None:
        for index in range(max(0, held.sequence.num_computed - 1) // self.BLOCK_SIZE, end // self.BLOCK_SIZE):
            key = self.key(held.sequence, (index + 1) * self.BLOCK_SIZE)
            if held.keys[index] is None and not self.holders[key] and key not in self.released:
                held.keys[index] = key
                self.holders[key] += 1
                self.num_unknown -= 1

    def let_go(self, held: Held) -> None:
        for key in reversed(held.keys):
            if key is None:
                self.num_unknown -= 1
                continue
            self.holders[key] -= 1
            if self.holders[key] == 0:
                self.released.append(key)
        held.keys = []

    def write(self, sequence: Sequence, end: int) -> None:
        others = {block for held in self.live if held.sequence is not sequence for block in held.sequence.block_table}
        for position in range(sequence.num_computed, end):
            slot = sequence.block_table[position // self.BLOCK_SIZE], position % self.BLOCK_SIZE
            assert slot[0] not in others, "a shared block is written"
            self.slots[slot] = self.key(sequence, position + 1)
        sequence.num_computed = end

    @rule(
        ids=SMALL,
        salt=st.sampled_from([None, "s"]),
        steering=st.sampled_from([None, Steering(experts_per_token=1)]),
        scored=st.booleans(),
    )
    def admit(self, ids: list[int], salt: str | None, steering: Steering | None, scored: bool) -> None:
        self.arrivals += 1
        sequence = make_sequence(
            ids, salt=salt, steering=steering, prompt_logprobs=0 if scored else None, arrival=self.arrivals
        )
        prefix = self.blocks.find_prefix(sequence)
        expected = [] if scored else self.expected_prefix(sequence)
        assert len(prefix) == len(expected)
        free_before = self.blocks.num_free
        needed = self.blocks.num_needed(sequence, len(ids), prefix)
        if needed > free_before:
            return
        held = Held(sequence)
        self.blocks.take_prefix(sequence, prefix)
        assert sequence.num_computed == len(expected) * self.BLOCK_SIZE
        for key in expected:
            if key in self.released:
                self.released.remove(key)
            self.holders[key] += 1
            held.keys.append(key)
        self.blocks.grow(sequence, len(ids))
        self.take_blocks(held, -(-len(ids) // self.BLOCK_SIZE) - len(expected))
        assert free_before - self.blocks.num_free == needed
        self.blocks.publish(sequence, len(ids))
        self.publish(held, len(ids))
        self.write(sequence, len(ids))
        self.live.append(held)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        held = data.draw(st.sampled_from(self.live), label="sequence")
        sequence = held.sequence
        needed = self.blocks.num_needed(sequence, sequence.num_tokens + 1)
        if needed > self.blocks.num_free:
            return
        sequence.token_ids.append(token)
        self.blocks.grow(sequence, sequence.num_tokens)
        self.take_blocks(held, needed)
        self.blocks.publish(sequence, sequence.num_tokens)
        self.publish(held, sequence.num_tokens)
        self.write(sequence, sequence.num_tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.live), label="sequence")
        self.live.remove(held)
        self.blocks.free(held.sequence)
        self.let_go(held)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def fail(self, data: st.DataObject, tokens: list[int]) -> None:
        """A step that was published and not computed: its keys are forgotten, its blocks come back."""
        held = data.draw(st.sampled_from(self.live), label="sequence")
        sequence = held.sequence
        needed = self.blocks.num_needed(sequence, sequence.num_tokens + len(tokens))
        if needed > self.blocks.num_free:
            return
        known = len([key for key in held.keys if key is not None])
        sequence.token_ids += tokens
        self.blocks.grow(sequence, sequence.num_tokens)
        self.take_blocks(held, needed)
        self.blocks.publish(sequence, sequence.num_tokens)
        self.publish(held, sequence.num_tokens)
        assert len([key for key in held.keys if key is not None]) >= known
        for position in range(sequence.num_computed, sequence.num_tokens):  # half written, with nonsense
            self.slots.pop((sequence.block_table[position // self.BLOCK_SIZE], position % self.BLOCK_SIZE), None)
        self.blocks.retract(sequence)
        for index in range(sequence.num_computed // self.BLOCK_SIZE, len(held.keys)):
            key = held.keys[index]
            if key is not None:
                self.holders[key] -= 1
                self.num_unknown += 1
                held.keys[index] = None
        self.live.remove(held)
        self.blocks.free(sequence)
        self.let_go(held)

    @rule(ids=SMALL, salt=st.sampled_from([None, "s"]))
    def look_up(self, ids: list[int], salt: str | None) -> None:
        sequence = make_sequence(ids, salt=salt)
        found = self.blocks.find_prefix(sequence)
        assert len(found) == len(self.expected_prefix(sequence))
        for index, block in enumerate(found):
            for offset in range(self.BLOCK_SIZE):
                assert self.slots[block, offset] == self.key(sequence, index * self.BLOCK_SIZE + offset + 1)

    @invariant()
    def references_equal_what_sequences_hold(self) -> None:
        counted = Counter(block for held in self.live for block in held.sequence.block_table)
        assert self.blocks._references == [counted[block] for block in range(self.NUM_BLOCKS)]

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        held = [block for block, count in enumerate(self.blocks._references) if count]
        everything = held + list(self.blocks._cached) + self.blocks._blank
        assert sorted(everything) == list(range(self.NUM_BLOCKS))
        assert self.blocks.num_free == self.expected_free
        assert len(self.blocks._cached) == len(self.released)
        assert not set(self.blocks._blank) & self.blocks._hash_of.keys()
        assert {block: key for key, block in self.blocks._block_of.items()} == self.blocks._hash_of

    @invariant()
    def computed_positions_hold_their_own_contents(self) -> None:
        for held in self.live:
            for position in range(held.sequence.num_computed):
                slot = held.sequence.block_table[position // self.BLOCK_SIZE], position % self.BLOCK_SIZE
                assert self.slots[slot] == self.key(held.sequence, position + 1)

    def teardown(self) -> None:
        for held in self.live:
            self.blocks.free(held.sequence)
        assert self.blocks.num_free == self.NUM_BLOCKS


TestNaivePrefixCache = NaivePrefixCache.TestCase
TestNaivePrefixCache.settings = settings(max_examples=120, stateful_step_count=30, deadline=None, derandomize=True)
