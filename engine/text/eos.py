"""The ends of a text that the tokenizer's files know of and config.json, which the core goes by, may not."""

from __future__ import annotations

from dataclasses import replace

from engine.types import SamplingParams, TokenEvent


def with_eos_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> SamplingParams:
    """Parameters for the core that also stop at `eos_token_ids` (`Tokenizer.eos_token_ids`), unless `ignore_eos`."""
    more = eos_token_ids.difference(params.stop_token_ids)
    if params.ignore_eos or not more:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, *sorted(more)))


def stop_reason(event: TokenEvent, params: SamplingParams) -> int | None:
    """The stop id that ended a request whose caller asked for `params`; None for an end-of-sequence id."""
    return event.stop_reason if event.stop_reason in params.stop_token_ids else None
