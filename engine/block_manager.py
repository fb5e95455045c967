"""BlockManager: who owns which block of the paged KV cache (Kwon et al. 2023, arXiv 2309.06180, section 4).

A block holds the keys and values of `block_size` consecutive positions of one sequence, in every layer. Full blocks
are known by a hash of everything that decides their contents, and are shared by reference count between sequences
that begin alike. A block nobody holds keeps its hash until it is needed for something else, least recently used
first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from engine.sequence import Sequence


class BlockManager:
    """Hands out the `num_blocks` blocks of the cache. A block is in exactly one of three states:

    held       by one or more sequences: `_references[block]` counts them
    cached     held by nobody, its contents still findable by hash: in `_cached`, oldest first
    blank      held by nobody, contents meaningless: in `_blank`
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queries = 0
        self.num_hits = 0
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions: with blocks of 16, 16 tokens need 1 and 17 need 2."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the longest known beginning of `sequence`, without taking them.

        The last token is never taken from the cache, since its logits are needed: 32 tokens with blocks of 16 can
        find 1 block, 33 tokens 2. A request that wants to see its whole prompt computed finds nothing.
        """
        if not self.enable_prefix_caching or sequence.request.needs_whole_prompt:
            return []
        most = (sequence.num_tokens - 1) // self.block_size
        self._extend_hashes(sequence, most)
        found: list[int] = []
        for key in sequence.block_hashes[:most]:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_needed(self, sequence: Sequence, num_tokens: int, prefix: list[int] | None = None) -> int:
        """How many free blocks it takes to let `sequence` hold `num_tokens` tokens, starting from `prefix` if given.

        A block of the prefix that nobody holds is free now and will not be after: it counts as needed.
        """
        if prefix is None:
            return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))
        unheld = sum(1 for block in prefix if self._references[block] == 0)
        return max(0, self.blocks_for(num_tokens) - len(prefix)) + unheld

    def take_prefix(self, sequence: Sequence, prefix: list[int]) -> None:
        """Let `sequence`, which holds nothing yet, hold `prefix` and count its tokens as computed."""
        assert not sequence.block_table
        assert sequence.num_computed == 0
        for block in prefix:
            self._hold(block)
        sequence.block_table = list(prefix)
        sequence.num_computed = len(prefix) * self.block_size

    def record_query(self, num_tokens: int, num_found: int) -> None:
        """Count one look-up of a prompt, in tokens."""
        if self.enable_prefix_caching:
            self.num_queries += num_tokens
            self.num_hits += num_found

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give `sequence` blocks until it can hold `num_tokens` tokens. The caller has checked `num_needed`."""
        for _ in range(self.num_needed(sequence, num_tokens)):
            block = self._take_blank()
            self._references[block] = 1
            sequence.block_table.append(block)

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens findable by others.

        They may be published before they are computed, as long as they are computed in the step that is being
        scheduled: a step writes all keys and values of a layer before it reads any. When that step fails, `retract`.
        A block whose contents are known already under another number stays unknown, and so does, for a step, one
        that ends with a pending token.
        """
        if not self.enable_prefix_caching:
            return
        full = min(num_tokens, len(sequence.token_ids)) // self.block_size
        self._extend_hashes(sequence, full)
        for index in range(max(0, sequence.num_computed - 1) // self.block_size, full):
            block, key = sequence.block_table[index], sequence.block_hashes[index]
            if key not in self._block_of and block not in self._hash_of:
                self._block_of[key] = block
                self._hash_of[block] = key

    def retract(self, sequence: Sequence) -> None:
        """Forget the hashes of all blocks of `sequence` that are not known to be computed."""
        for block in sequence.block_table[sequence.num_computed // self.block_size :]:
            self._forget(block)

    def free(self, sequence: Sequence) -> None:
        """Let go of every block of `sequence`. Its last blocks will be reused first: a beginning serves more
        requests.
        """
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} freed twice"
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)
        sequence.block_table = []
        sequence.num_computed = 0

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _take_blank(self) -> int:
        if self._blank:
            return self._blank.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        if block in self._cached:
            del self._cached[block]
            self._blank.append(block)

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        """Extend `sequence.block_hashes` to its first `num_blocks` full blocks.

        hash(i) = SHA-256(hash(i - 1) + token ids of block i as 32-bit integers), hash(-1) = SHA-256(namespace): equal
        hashes mean equal tokens at equal positions after an equal beginning, within one namespace.
        """
        hashes, size = sequence.block_hashes, self.block_size
        if len(hashes) >= num_blocks:
            return
        previous = hashes[-1] if hashes else hashlib.sha256(namespace(sequence)).digest()
        for index in range(len(hashes), num_blocks):
            tokens = array("i", sequence.token_ids[index * size : (index + 1) * size])
            previous = hashlib.sha256(previous + tokens.tobytes()).digest()
            hashes.append(previous)


def namespace(sequence: Sequence) -> bytes:
    """What a block's contents depend on beside the tokens before it: the request's salt and its steering digest."""
    salt = sequence.request.cache_salt
    steering = sequence.request.steering
    parts = (
        b"" if salt is None else b"salt:" + salt.encode("utf-8"),
        b"" if steering is None else steering.digest(),
    )
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)
