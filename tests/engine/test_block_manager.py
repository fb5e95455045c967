"""Block manager: sizes, hashes, prefixes, the order of eviction."""

from __future__ import annotations

import hashlib
import struct

import pytest

from engine.block_manager import BlockManager, namespace
from engine.sequence import Sequence
from engine.types import Steering
from tests.engine.sequences import make_sequence


def compute(blocks: BlockManager, sequence: Sequence, num_tokens: int | None = None) -> None:
    """What a step does with the next `num_tokens` tokens (None: all) of `sequence`, prefix look-up included."""
    if not sequence.block_table:
        blocks.take_prefix(sequence, blocks.find_prefix(sequence))
    end = sequence.num_tokens if num_tokens is None else sequence.num_computed + num_tokens
    blocks.grow(sequence, end)
    blocks.publish(sequence, end)
    sequence.num_computed = end


def num_found(blocks: BlockManager, token_ids: list[int], **fields: object) -> int:
    """Tokens of the cached prefix of a new request."""
    sequence = make_sequence(token_ids, **fields)  # type: ignore[arg-type]
    return len(blocks.find_prefix(sequence)) * blocks.block_size


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_for(num_tokens: int, expected: int) -> None:
    assert BlockManager(4, 16).blocks_for(num_tokens) == expected


@pytest.mark.parametrize(("num_tokens", "found"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (40, 32)])
def test_the_last_token_never_comes_from_the_cache(num_tokens: int, found: int) -> None:
    blocks = BlockManager(8, 16)
    compute(blocks, make_sequence(list(range(64))))
    assert num_found(blocks, list(range(num_tokens))) == found


def test_a_prefix_ends_where_the_tokens_differ() -> None:
    blocks = BlockManager(16, 4)
    ids = list(range(20))
    compute(blocks, make_sequence(ids))
    for changed in range(20):
        other = [*ids, 77]
        other[changed] = 99
        assert num_found(blocks, other) == changed // 4 * 4
    # the same block of tokens after another beginning, or at another position, is another block
    assert num_found(blocks, ids[4:8] * 3) == 0


def test_what_keeps_equal_tokens_apart() -> None:
    ids = list(range(9))
    variants: list[dict[str, object]] = [
        {},
        {"salt": "a"},
        {"salt": "b"},
        {"salt": ""},
        {"salt": "salt:"},
        {"salt": "a\x00"},
        {"steering": Steering()},
        {"steering": Steering(experts_per_token=2)},
        {"steering": Steering(min_p=0.1)},
        {"steering": Steering(min_p=0.2)},
        {"steering": Steering(forbidden=((None, (0,)),))},
        {"steering": Steering(forbidden=((0, (0,)),))},
        {"steering": Steering(forbidden=((0, (1,)),))},
        {"steering": Steering(forbidden=((1, (0,)),))},
        {"salt": "a", "steering": Steering()},
        {"salt": "a", "steering": Steering(min_p=0.1)},
    ]
    for first in variants:
        blocks = BlockManager(8, 4)
        compute(blocks, make_sequence(ids, **first))  # type: ignore[arg-type]
        for second in variants:
            assert num_found(blocks, ids, **second) == (8 if first == second else 0), (first, second)


def test_block_hashes_are_a_sha256_chain() -> None:
    blocks = BlockManager(8, 3)
    steering = Steering(experts_per_token=1)
    sequence = make_sequence([5, 0, 2**31 - 1, 7, 8, 9, 1, 2], salt="pepper", steering=steering)
    compute(blocks, sequence)
    salt = b"salt:pepper"
    key = hashlib.sha256(struct.pack("<I", len(salt)) + salt + struct.pack("<I", 32) + steering.digest()).digest()
    expected = []
    for tokens in ([5, 0, 2**31 - 1], [7, 8, 9]):
        key = hashlib.sha256(key + struct.pack("<3i", *tokens)).digest()
        expected.append(key)
    assert sequence.block_hashes == expected
    assert namespace(make_sequence([1])) == b"\x00" * 8


def test_a_scored_prompt_reads_nothing_and_serves_others() -> None:
    ids = list(range(13))
    blocks = BlockManager(16, 4)
    compute(blocks, make_sequence(ids))
    assert num_found(blocks, ids, prompt_logprobs=0) == 0
    fresh = BlockManager(16, 4)
    compute(fresh, make_sequence(ids, prompt_logprobs=3))
    assert num_found(fresh, ids) == 12


def test_without_the_cache_nothing_is_found_or_counted() -> None:
    blocks = BlockManager(4, 4, enable_prefix_caching=False)
    sequence = make_sequence(list(range(9)))
    compute(blocks, sequence)
    blocks.record_query(9, 0)
    assert num_found(blocks, list(range(9))) == 0
    blocks.free(sequence)
    assert (blocks.num_free, blocks.num_queries, blocks.num_hits) == (4, 0, 0)
    assert num_found(blocks, list(range(9))) == 0


def test_queries_are_counted_in_tokens() -> None:
    blocks = BlockManager(4, 4)
    blocks.record_query(9, 0)
    blocks.record_query(9, 8)
    assert (blocks.num_queries, blocks.num_hits) == (18, 8)


def test_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockManager(6, 2)
    old, new = [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]
    sequences = [make_sequence(old), make_sequence(new)]
    for sequence in sequences:
        compute(blocks, sequence)
    for sequence in sequences:
        blocks.free(sequence)
    assert blocks.num_free == 6
    remaining = [(num_found(blocks, [*old, 0]), num_found(blocks, [*new, 0]))]
    for index in range(6):
        compute(blocks, make_sequence([100 + index]))
        remaining.append((num_found(blocks, [*old, 0]), num_found(blocks, [*new, 0])))
    assert remaining == [(6, 6), (4, 6), (2, 6), (0, 6), (0, 4), (0, 2), (0, 0)]


def test_using_a_prefix_makes_it_young() -> None:
    blocks = BlockManager(4, 2)
    first, second = [1, 1, 2, 2], [3, 3, 4, 4]
    for ids in (first, second):
        sequence = make_sequence(ids)
        compute(blocks, sequence)
        blocks.free(sequence)
    again = make_sequence([*first, 9])
    blocks.take_prefix(again, blocks.find_prefix(again))
    blocks.free(again)
    compute(blocks, make_sequence([100, 100, 101, 101]))
    assert (num_found(blocks, [*first, 0]), num_found(blocks, [*second, 0])) == (4, 0)


def test_blank_blocks_are_used_before_cached_ones() -> None:
    blocks = BlockManager(8, 2)
    sequence = make_sequence([1, 1, 2, 2, 3])
    compute(blocks, sequence)
    blocks.free(sequence)
    compute(blocks, make_sequence(list(range(50, 62))))  # 6 blocks: the 5 never used and the one not full
    assert num_found(blocks, [1, 1, 2, 2, 3]) == 4


def test_a_free_block_of_a_prefix_counts_as_needed() -> None:
    blocks = BlockManager(5, 2)
    first = make_sequence([1, 1, 2, 2])
    compute(blocks, first)
    second = make_sequence([1, 1, 2, 2, 3, 3, 4])
    prefix = blocks.find_prefix(second)
    assert len(prefix) == 2
    assert blocks.num_needed(second, 7) == 4
    assert blocks.num_needed(second, 7, prefix) == 2
    blocks.free(first)
    assert blocks.num_needed(second, 7, prefix) == 4
    free = blocks.num_free
    blocks.take_prefix(second, prefix)
    blocks.grow(second, 7)
    assert free - blocks.num_free == 4


def test_contents_known_already_stay_under_their_first_block() -> None:
    blocks = BlockManager(8, 2)
    first, second = make_sequence([1, 1, 2, 2]), make_sequence([1, 1, 2, 2])
    for sequence in (first, second):  # both scheduled before either was known
        blocks.grow(sequence, 4)
    for sequence in (first, second):
        blocks.publish(sequence, 4)
        sequence.num_computed = 4
    assert blocks.find_prefix(make_sequence([1, 1, 2, 2, 3])) == first.block_table
    blocks.free(second)
    assert blocks.find_prefix(make_sequence([1, 1, 2, 2, 3])) == first.block_table
    assert blocks.num_free == 6


def test_retract_forgets_what_the_failed_step_published_and_nothing_else() -> None:
    blocks = BlockManager(8, 4)
    ids = list(range(16))
    sequence = make_sequence(ids)
    compute(blocks, sequence, 6)  # block 0 is full, block 1 half
    blocks.grow(sequence, 16)
    blocks.publish(sequence, 16)
    assert num_found(blocks, [*ids, 0]) == 16
    blocks.retract(sequence)
    assert num_found(blocks, [*ids, 0]) == 4
    blocks.free(sequence)
    assert num_found(blocks, [*ids, 0]) == 4
    assert blocks.num_free == 8


def test_retract_reaches_those_who_took_the_prefix_in_the_same_step() -> None:
    blocks = BlockManager(8, 2)
    first, second = make_sequence([1, 1, 2, 2, 3]), make_sequence([1, 1, 2, 2, 4])
    for sequence in (first, second):
        blocks.take_prefix(sequence, blocks.find_prefix(sequence))
        blocks.grow(sequence, 5)
        blocks.publish(sequence, 5)
    assert first.block_table[:2] == second.block_table[:2]
    for sequence in (first, second):
        blocks.retract(sequence)
        blocks.free(sequence)
    assert num_found(blocks, [1, 1, 2, 2, 3]) == 0
    assert blocks.num_free == 8


def test_freeing_twice_is_an_error_of_ours() -> None:
    blocks = BlockManager(2, 2)
    sequence = make_sequence([1])
    compute(blocks, sequence)
    table = list(sequence.block_table)
    blocks.free(sequence)
    sequence.block_table = table
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(sequence)
