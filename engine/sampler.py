"""Sampler: logits -> one token a row, for a whole batch at once.

Order, as the HTTP contract has it: repetition, presence and frequency penalties, logit_bias, the ban on ending before
min_tokens, the grammars' masks, temperature, top-k, top-p, min-p, draw. Log probabilities are of the untouched logits.

A draw is a function of (seed, choice, position) and the distribution alone: replaying a preempted sequence, or
running it in another batch, draws the same token. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.grammar.matcher import Matcher
from engine.masks import MaskedRow, TokenMasks
from engine.samples import Logprobs, Samples
from engine.transfers import HostValues, to_device
from engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of the sequence behind one row of logits."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    end_ids: Sequence[int]
    """Ids that would end the sequence: forbidden before min_tokens."""
    matcher: Matcher | None = None
    """The sequence's place in its grammar."""

    @property
    def position(self) -> int:
        """How many tokens were generated before: the counter of the random stream."""
        return len(self.output_ids)

    @property
    def may_end(self) -> bool:
        return len(self.output_ids) >= self.params.min_tokens


def sample(logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None) -> Samples:
    """One token for each row of `logits` [R, V] float32. Does not change `logits`."""
    assert logits.shape[0] == len(rows)
    adjusted = _adjusted(logits, rows)
    if masks is not None:
        adjusted = adjusted.clone() if adjusted is logits else adjusted
        masks.apply(adjusted)
    chosen = _choose(adjusted, rows)
    asked = [(index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return Samples(chosen, None, ())
    indices, num_top = zip(*asked, strict=True)
    select = to_device(indices, torch.int64, logits.device)
    return Samples(chosen, _logprobs(logits[select], chosen[select], num_top), indices)


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> Logprobs:
    """The raw log probabilities of `token_ids` [R] under `logits` [R, V] float32, with the `num_top` best of each
    row.
    """
    ids = to_device(token_ids, torch.int64, logits.device)
    return _logprobs(logits, ids, (num_top,) * len(token_ids))


def masked_rows(rows: Sequence[SamplingRow]) -> list[MaskedRow]:
    """The rows that have a grammar."""
    return [
        MaskedRow(index, row.matcher, _banned(row, row.matcher))
        for index, row in enumerate(rows)
        if row.matcher is not None
    ]


def _banned(row: SamplingRow, matcher: Matcher) -> Sequence[int]:
    """Tokens that may not end the answer while its grammar can go on: none, or those that `ignore_eos` ignores, or all
    before min_tokens."""
    if not row.may_end:
        return (*row.end_ids, *matcher.end_ids)
    return matcher.end_ids if row.params.ignore_eos else ()


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments, with 53 random bits.

    Three rounds of SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", figure 16) absorb the words one after another.
    """
    state = 0
    for word in (seed, choice, position):
        state = _mix((state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK)
    return (state >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """`logits` with penalties, bias and bans; the same tensor when no row asks for any."""
    changed = logits
    for index, row in enumerate(rows):
        steps = _adjustments(row)
        if steps and changed is logits:
            changed = logits.clone()
        for step in steps:
            step(changed[index])
    return changed


def _adjustments(row: SamplingRow) -> list[Callable[[Tensor], None]]:
    params = row.params
    steps: list[Callable[[Tensor], None]] = []
    if params.repetition_penalty != 1.0:
        steps.append(lambda logits: _penalize_repetition(logits, row))
    if params.presence_penalty or params.frequency_penalty:
        steps.append(lambda logits: _penalize_counts(logits, row))
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        steps.append(lambda logits: _add(logits, ids, biases))
    if not row.may_end and row.end_ids and row.matcher is None:  # a grammar's mask has the ban in it
        steps.append(lambda logits: _add(logits, row.end_ids, [-torch.inf] * len(row.end_ids)))
    return steps


def _add(logits: Tensor, ids: HostValues, amounts: HostValues) -> None:
    places = to_device(ids, torch.int64, logits.device)
    logits.index_put_((places,), to_device(amounts, logits.dtype, logits.device), accumulate=True)


def _penalize_repetition(logits: Tensor, row: SamplingRow) -> None:
    """Keskar et al. 2019 (CTRL), section 4.1, over prompt and output; negative logits are multiplied, positive
    divided.
    """
    seen = to_device([*row.prompt_ids, *row.output_ids], torch.int64, logits.device)  # the same twice does no harm
    values = logits[seen]
    penalty = row.params.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _penalize_counts(logits: Tensor, row: SamplingRow) -> None:
    """OpenAI's presence and frequency penalties, over the output."""
    if not row.output_ids:
        return
    ids, counts = np.unique(np.asarray(row.output_ids, dtype=np.int64), return_counts=True)
    amounts = -row.params.presence_penalty - row.params.frequency_penalty * counts
    _add(logits, ids, amounts)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """[R] int64: the most likely token of greedy rows, a drawn one of the others."""
    chosen = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        select = to_device(drawn, torch.int64, logits.device)
        chosen[select] = _draw(logits[select], [rows[index] for index in drawn])
    return chosen


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return to_device(values, torch.float32, device).unsqueeze(-1)

    logits = logits / column([row.params.temperature for row in rows])
    filtered = [index for index, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1.0]
    if filtered:
        select = to_device(filtered, torch.int64, device)
        logits[select] = _top_k_top_p(logits[select], [rows[index].params for index in filtered])
    probabilities = torch.softmax(logits, dim=-1)
    if any(row.params.min_p > 0.0 for row in rows):
        floor = column([row.params.min_p for row in rows]) * probabilities.amax(dim=-1, keepdim=True)
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    # Inverse transform: the first token at which the running sum passes u times the whole. float64, so that the sum of
    # a large vocabulary loses nothing.
    cumulative = probabilities.double().cumsum(dim=-1)
    draws = [uniform(row.seed, row.params.choice, row.position) for row in rows]
    targets = to_device(draws, torch.float64, device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _top_k_top_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits with -inf outside the top k and outside the nucleus (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    The nucleus is taken after top-k: the fewest most likely tokens whose probabilities reach top_p. At least one is
    left.
    """
    size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    limits = to_device([min(p.top_k, size) if p.top_k > 0 else size for p in params], torch.int64, logits.device)
    ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= limits.unsqueeze(-1), -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = to_device([p.top_p for p in params], torch.float32, logits.device).unsqueeze(-1)
    outside = (before >= top_p) & (top_p < 1.0)
    outside[:, 0] = False
    return torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(outside, -torch.inf))


def _logprobs(logits: Tensor, chosen: Tensor, num_top: tuple[int, ...]) -> Logprobs:
    raw = torch.log_softmax(logits, dim=-1)
    own = raw.gather(-1, chosen.unsqueeze(-1))
    best_values, best_ids = _best(raw, min(max(num_top, default=0), raw.shape[-1]))
    return Logprobs(chosen, own.squeeze(-1), (raw > own).sum(dim=-1) + 1, best_ids, best_values, num_top)


def _best(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` largest of each row of `values` [R, V] float32 and where they are, equals in the order of their
    indices.

    torch.topk leaves that order open, so it is given integers without equals: above, the bits of the value, as an
    integer that is ordered like it (those of a negative number are inverted but for the sign); below, the index,
    counted from the end.
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32
    from_end = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    indices = (ordered + from_end).topk(number, dim=-1).indices
    return values.gather(-1, indices), indices
