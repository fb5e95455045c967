"""Times of paged attention: decodes of many lengths and batch sizes, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from engine.backends.cuda.attention import AttentionTiles, attention
from engine.batch import Batch
from tests.bench.card import references
from tests.bench.card.bench import Bench
from tests.bench.card.inputs import Cache, normal

BATCH_SIZES = (1, 4, 16, 64, 128, 256)
CONTEXTS = (128, 512, 1024, 4096, 8192, 32768)
CHUNKS = ((512, 512), (2048, 2048), (2048, 8192), (2048, 32768))
"""(queries, context) of one sequence."""
BLOCK_SIZE = 16
SHARE_OF_MEMORY = 0.6


def attention_times(bench: Bench) -> None:
    """Of one layer, with a cache of the model's dtype and one of e4m3 where the card reads it."""
    batch_sizes, contexts = ((1, 3), (5, 40)) if bench.tiny else (BATCH_SIZES, CONTEXTS)
    chunks = ((7, 20),) if bench.tiny else CHUNKS
    eight_bits = bench.card.weight_dtype("fp8") is torch.float8_e4m3fn
    for dtype in (bench.dtype, torch.float8_e4m3fn) if eight_bits else (bench.dtype,):
        decodes = [(size, 1, context) for context in contexts for size in batch_sizes]
        work = [*decodes, *((1, *chunk) for chunk in chunks)]
        num_blocks = min(max(blocks_of(size, context) for size, _, context in work), room(bench, dtype))
        cache = Cache.random(num_blocks, BLOCK_SIZE, bench.shape, device=bench.device, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        for num_seqs, queries, context in work:
            keys = {"cache": name, "batch": num_seqs, "queries": queries, "context": context}
            if blocks_of(num_seqs, context) <= num_blocks and bench.is_due("attention", keys):
                _time(bench, keys, cache, cache.batch([(queries, context)] * num_seqs))
        del cache  # before the next one is made


def blocks_of(num_seqs: int, context: int) -> int:
    return num_seqs * -(-context // BLOCK_SIZE)


def room(bench: Bench, dtype: torch.dtype) -> int:
    """Blocks of a layer's cache that there is memory for."""
    free = torch.cuda.mem_get_info(bench.device)[0] if bench.device.type == "cuda" else 1 << 30
    numbers = 2 * BLOCK_SIZE * bench.shape.num_kv_heads * bench.shape.head_dim
    return int(free * SHARE_OF_MEMORY) // (numbers * dtype.itemsize)


def _time(bench: Bench, keys: Mapping[str, Any], cache: Cache, batch: Batch) -> None:
    shape = bench.shape
    query = normal(batch.num_tokens, shape.num_heads, shape.head_dim, device=bench.device, dtype=bench.dtype)
    tiles = AttentionTiles.of(bench.card, shape, bench.dtype)
    run = partial(attention, query, cache.keys, cache.values, batch, shape, tiles)
    output, last = run(), len(batch.query_lens) - 1
    queries, context = batch.query_lens[last], batch.context_lens[last]
    exact = references.attention(query, cache.keys, cache.values, batch, shape, last)
    error = references.relative_error(output[-queries:], exact)
    bench.check(f"attention {keys}", error, 1e-4 if bench.dtype == torch.float32 else 0.01)
    read = 2 * cache.keys[0, 0].nbytes * sum(batch.context_lens)
    seen = context * queries - queries * (queries - 1) // 2  # by the queries of a sequence
    bench.time(
        "attention",
        keys,
        run,
        num_bytes=read,
        operations=4 * shape.num_heads * shape.head_dim * seen * len(batch.query_lens),
        error=error,
    )
