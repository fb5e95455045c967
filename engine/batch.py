"""StepPlan -> Batch: the tensors of one step.

Example, blocks of 4: sequence A decodes its token at position 5 (block table [7, 2]), sequence B computes positions 0
to 2 of its prompt (block table [3]):

    positions    [5, 0, 1, 2]          cu_seqlens [0, 1, 4]
    slot_mapping [2*4 + 1, 12, 13, 14] seq_lens   [6, 3]         (position 5 is slot 1 of A's second block, block 2)
    block_tables [[7, 2], [3, 0]]      logits_indices [0, 3]     (when both sample)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.routing.base import RoutingInputs
from engine.routing.steering import SteeringTable
from engine.scheduler import Chunk, StepPlan
from engine.transfers import HostValues, to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of B sequences, flattened. Index tensors live on the device of the forward pass.

    The lists repeat on the host what a backend needs to shape its work without a synchronisation.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position within the sequence
    slot_mapping: Tensor  # [T] int64, block * block_size + offset, where the token's key and value are written
    cu_seqlens: Tensor  # [B + 1] int32, sequence b owns tokens [cu_seqlens[b], cu_seqlens[b + 1])
    seq_lens: Tensor  # [B] int32, positions in the cache once this step is written
    block_tables: Tensor  # [B, max blocks] int32, padded with 0
    logits_indices: Tensor  # [R] int64, tokens whose logits are wanted
    routing: RoutingInputs
    query_lens: list[int]  # B
    context_lens: list[int]  # B, seq_lens on the host

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The tokens that the last step sampled, which the host may not know yet."""

    token_ids: Tensor  # [R] int64
    rows: Mapping[int, int]
    """Whose they are: Sequence.arrival -> row."""

    def fill_pending(self, plan: StepPlan, input_ids: Tensor) -> None:
        """Put them where the chunks of `plan` have a pending token: input_ids [T] int64, on the same device."""
        places, rows, end = [], [], 0
        for chunk in plan.chunks:
            end += chunk.num_tokens
            if chunk.has_pending:
                places.append(end - 1)
                rows.append(self.rows[chunk.sequence.arrival])
        if places:
            device = input_ids.device
            tokens = self.token_ids.index_select(0, to_device(rows, torch.int64, device))
            input_ids.index_copy_(0, to_device(places, torch.int64, device), tokens)


def build(plan: StepPlan, *, block_size: int, steering: SteeringTable, device: torch.device) -> Batch:
    """Lay out the chunks of `plan`, which is not empty, in their order. Fills `steering` for what is new in it.

    A pending token is 0: `LastTokens.fill_pending` puts it in its place.
    """
    chunks = plan.chunks
    query_lens = [chunk.num_tokens for chunk in chunks]
    context_lens = [chunk.start + chunk.num_tokens for chunk in chunks]
    cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=cu_seqlens[1:])

    input_ids = np.concatenate([_tokens(chunk) for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.num_tokens) for chunk in chunks])
    block_tables = np.zeros((len(chunks), max(len(chunk.sequence.block_table) for chunk in chunks)), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        block_tables[row, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    rows = np.repeat(np.arange(len(chunks)), query_lens)
    slots = block_tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    steerings = [chunk.sequence.request.steering for chunk in chunks]
    steering_slots = np.repeat(np.asarray(steering.slots_of(steerings), dtype=np.int64), query_lens)
    seeds = np.repeat(np.asarray([_stream(chunk) for chunk in chunks], dtype=np.int64), query_lens)

    def int64(array: HostValues) -> Tensor:
        return to_device(array, torch.int64, device)

    def int32(array: HostValues) -> Tensor:
        return to_device(array, torch.int32, device)

    device_positions = int64(positions)
    return Batch(
        input_ids=int64(input_ids),
        positions=device_positions,
        slot_mapping=int64(slots),
        cu_seqlens=int32(cu_seqlens),
        seq_lens=int32(context_lens),
        block_tables=int32(block_tables),
        logits_indices=int64(logits_rows(plan)),
        routing=RoutingInputs(
            num_valid_tokens=torch.full((), len(positions), dtype=torch.int64, device=device),
            slots=int64(steering_slots),
            top_k=steering.top_k,
            min_p=steering.min_p,
            forbidden=steering.forbidden,
            seeds=int64(seeds),
            positions=device_positions,
            max_top_k=steering.max_top_k(steerings),
        ),
        query_lens=query_lens,
        context_lens=context_lens,
    )


def logits_rows(plan: StepPlan) -> list[int]:
    """The batch's tokens whose logits are wanted: the last of every chunk that samples, in chunk order."""
    rows, end = [], 0
    for chunk in plan.chunks:
        end += chunk.num_tokens
        if chunk.samples:
            rows.append(end - 1)
    return rows


def _tokens(chunk: Chunk) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    tokens = np.zeros(chunk.num_tokens, dtype=np.int64)
    known = chunk.sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
    tokens[: len(known)] = known
    return tokens


def _stream(chunk: Chunk) -> int:
    """The random stream of a choice, as a signed 64-bit integer: choices of one request draw different numbers."""
    word = (chunk.sequence.seed + chunk.sequence.request.params.choice * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
