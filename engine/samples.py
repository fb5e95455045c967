"""What was sampled and how likely it was: tensors of a step, then plain values for whoever asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.result import Sampled
from engine.transfers import to_host
from engine.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Raw log probabilities of one token in each of R rows, and of the most likely tokens there."""

    token_ids: Tensor  # [R] int64
    values: Tensor  # [R] float32
    ranks: Tensor  # [R] int64, 1 for the most likely
    best_ids: Tensor  # [R, N] int64, most likely first
    best_values: Tensor  # [R, N] float32
    num_top: tuple[int, ...]
    """How many of the N each row wants."""

    def to_host(self) -> Logprobs:
        """The same in host memory, once it has arrived (engine/transfers.py)."""
        return Logprobs(
            to_host(self.token_ids),
            to_host(self.values),
            to_host(self.ranks),
            to_host(self.best_ids),
            to_host(self.best_values),
            self.num_top,
        )

    def read(self) -> list[TokenLogprobs]:
        """One for each row; waits for the device where they are still on it."""
        columns = (self.token_ids, self.values, self.ranks, self.best_ids, self.best_values)
        rows = zip(*(column.tolist() for column in columns), self.num_top, strict=True)
        return [
            TokenLogprobs(token_id, value, rank, tuple(zip(ids, values, strict=True))[:num_top])
            for token_id, value, rank, ids, values, num_top in rows
        ]


@dataclass(frozen=True, slots=True)
class Samples:
    """A token for each of R rows."""

    token_ids: Tensor  # [R] int64
    logprobs: Logprobs | None
    """Of the rows that asked, in their order."""
    asked: tuple[int, ...]
    """Which rows those are."""

    def to_host(self) -> Samples:
        """As `Logprobs.to_host`."""
        return Samples(to_host(self.token_ids), None if self.logprobs is None else self.logprobs.to_host(), self.asked)

    def read(self) -> list[Sampled]:
        """One for each row; waits for the device where they are still on it."""
        reports: dict[int, TokenLogprobs] = {}
        if self.logprobs is not None:
            reports = dict(zip(self.asked, self.logprobs.read(), strict=True))
        return [Sampled(token_id, reports.get(row)) for row, token_id in enumerate(self.token_ids.tolist())]
