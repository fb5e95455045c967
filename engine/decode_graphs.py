"""Decode steps over buffers that stay where they are, so that the launches of a step can be recorded and replayed.

A decode launches hundreds of short kernels, and the host takes longer to launch them than the device to run them. A
CUDA graph is launched at once, but always the same: so there is one for each of a number of batch sizes, to which a
batch is padded, and for each number of experts that a token may have at most; everything else that differs from step to
step, steering and the routing record among it, is in tensors that a graph reads and writes where they were when it was
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.activations import MAX_GRAPH_BATCH
from engine.backends.base import KVCache
from engine.batch import Batch, LastTokens
from engine.models.decoder import Decoder
from engine.routing.base import RoutingInputs
from engine.routing.record import RoutingRecord
from engine.routing.steering import SteeringTable
from engine.scheduler import StepPlan
from engine.transfers import copy_to_device, to_device

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what is to be done, and returns what does it again."""


def padded_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to have graphs for: 1, 2, 4, then every 8th; up to 512.

    Example: 20 sequences: 1, 2, 4, 8, 16, 20.
    """
    largest = min(max_num_seqs, MAX_GRAPH_BATCH)
    return [size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest] + [largest]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a forward pass leaves on the device."""

    hidden: Tensor  # [T or more, D], before the final norm
    logits: Tensor | None  # [R, V] float32 of the chunks that sample, in their order; None: there are none
    routing: RoutingInputs
    recorded: bool
    """Whether the step is in the sums of the routing record already."""


class DecodeGraphs:
    """A captured forward pass for every padded batch size and number of choices."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        steering: SteeringTable,
        record: RoutingRecord | None,
        *,
        sizes: Sequence[int],
        widths: Sequence[int],
        hidden_size: int,
        vocab_size: int,
        max_model_len: int,
        capture: Capture,
        progress: bool = False,
    ) -> None:
        """sizes: see `padded_sizes`; widths: K_max, the model's K and others that steering may ask for."""
        self._sizes = sorted(sizes)
        self._widths = sorted(set(widths))
        self._buffers = _Buffers.zeros(
            self._sizes[-1],
            -(-max_model_len // cache.block_size),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            dtype=model.backend.dtype,
            device=model.backend.device,
        )
        self._batches: dict[tuple[int, int], Batch] = {}
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        assert record is None or self._sizes[-1] <= record.logits.shape[1], "the record has a row for each of a step"
        # The largest first: what the others need fits into the memory it leaves.
        for width, size in _shown(list(product(reversed(self._widths), reversed(self._sizes))), shown=progress):
            batch = self._buffers.batch(size, steering, width, max_model_len)
            self._batches[size, width] = batch
            self._replays[size, width] = capture(_Forward(model, batch, cache, record, self._buffers))
        if record is not None:
            record.reset()  # capturing was no traffic

    def fit(self, plan: StepPlan) -> bool:
        """Whether a step can be replayed: it decodes only, and not too many."""
        return len(plan.chunks) <= self._sizes[-1] and plan.num_tokens == len(plan.chunks)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, batch: Batch, last_tokens: LastTokens | None) -> StepTensors:
        """The forward pass of `plan`, whose `batch` is on the host. The tensors are good until the next one."""
        num_rows = batch.num_tokens
        size = next(size for size in self._sizes if size >= num_rows)
        width = next(width for width in self._widths if width >= batch.routing.max_top_k)
        self._buffers.fill(batch, size)
        if last_tokens is not None:
            last_tokens.fill_pending(plan, self._buffers.input_ids)
        self._replays[size, width]()
        rows = None
        if len(batch.logits_indices) < num_rows:
            rows = to_device(batch.logits_indices, torch.int64, self._buffers.logits.device)
        return StepTensors(
            hidden=self._buffers.hidden[:num_rows],
            logits=self._buffers.logits.index_select(0, rows) if rows is not None else self._buffers.logits[:num_rows],
            routing=self._batches[size, width].routing,
            recorded=True,
        )


@dataclass(frozen=True, slots=True)
class _Forward:
    """The launches that are captured."""

    model: Decoder
    batch: Batch
    cache: KVCache
    record: RoutingRecord | None
    buffers: _Buffers

    @torch.inference_mode()
    def __call__(self) -> None:
        size = self.batch.num_tokens
        hidden = self.model.forward(self.batch, self.cache, self.record)
        if self.record is not None:
            self.record.reduce(self.batch.routing)
        # Copied: what is allocated during a capture is the next graph's.
        self.buffers.logits[:size].copy_(self.model.logits(hidden))
        self.buffers.hidden[:size].copy_(hidden)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """A batch of N decodes and what comes of it. Rows of padding belong to no sequence and write into no slot.

    Example, two decodes padded to 4: num_valid_tokens 2, cu_seqlens [0, 1, 2, 2, 2], slot_mapping [37, 5, -1, -1].
    """

    input_ids: Tensor  # [N] int64, as in `Batch`; so are the next five
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    num_valid_tokens: Tensor  # [] int64, as in `RoutingInputs`; so are the next two
    slots: Tensor
    seeds: Tensor
    hidden: Tensor  # [N, D]
    logits: Tensor  # [N, V] float32

    @classmethod
    def zeros(
        cls, size: int, max_blocks: int, *, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> _Buffers:
        """No sequence: all rows are padding."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(size),
            positions=zeros(size),
            slot_mapping=zeros(size) - 1,
            cu_seqlens=zeros(size + 1, dtype=torch.int32),
            seq_lens=zeros(size, dtype=torch.int32),
            block_tables=zeros(size, max_blocks, dtype=torch.int32),
            num_valid_tokens=zeros(),
            slots=zeros(size),
            seeds=zeros(size),
            hidden=zeros(size, hidden_size, dtype=dtype),
            logits=zeros(size, vocab_size, dtype=torch.float32),
        )

    def batch(self, size: int, steering: SteeringTable, width: int, max_model_len: int) -> Batch:
        """The first `size` rows. On the host they are as long as they may be: launches are shaped for that."""
        return Batch(
            input_ids=self.input_ids[:size],
            positions=self.positions[:size],
            slot_mapping=self.slot_mapping[:size],
            cu_seqlens=self.cu_seqlens[: size + 1],
            seq_lens=self.seq_lens[:size],
            block_tables=self.block_tables[:size],
            logits_indices=torch.arange(size, device=self.input_ids.device),
            routing=RoutingInputs(
                num_valid_tokens=self.num_valid_tokens,
                slots=self.slots[:size],
                top_k=steering.top_k,
                min_p=steering.min_p,
                forbidden=steering.forbidden,
                seeds=self.seeds[:size],
                positions=self.positions[:size],
                max_top_k=width,
            ),
            query_lens=[1] * size,
            context_lens=[max_model_len] * size,
        )

    def fill(self, batch: Batch, size: int) -> None:
        """Copy a batch of decodes, which is on the host, and pad it to `size` rows."""
        num_rows = batch.num_tokens
        routing = batch.routing
        for target, source, padding in (
            (self.input_ids, batch.input_ids, 0),
            (self.positions, batch.positions, 0),
            (self.slot_mapping, batch.slot_mapping, -1),
            (self.cu_seqlens[1:], batch.cu_seqlens[1:], num_rows),
            (self.seq_lens, batch.seq_lens, 0),
            (self.slots, routing.slots, 0),
            (self.seeds, routing.seeds, 0),
        ):
            copy_to_device(target[:size], F.pad(source, (0, size - num_rows), value=padding))
        copy_to_device(self.block_tables[:num_rows, : batch.block_tables.shape[1]], batch.block_tables)
        copy_to_device(self.num_valid_tokens, routing.num_valid_tokens)


class CudaCapture:
    """A `Capture` of CUDA graphs, all in one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # Once for real: kernels are compiled, libraries make their workspaces.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay


def _shown(items: list[tuple[int, int]], *, shown: bool) -> Iterable[tuple[int, int]]:
    """With a bar on stderr, or without."""
    if not shown:
        return items
    from tqdm import tqdm

    bar: Iterable[tuple[int, int]] = tqdm(items, desc="Capturing CUDA graphs", unit="graph")
    return bar
