from engine.text import stop_reason, with_eos_ids
from engine.types import FinishReason, SamplingParams, TokenEvent


def test_the_core_stops_at_them_too() -> None:
    params = SamplingParams(stop_token_ids=(7, 3), temperature=0)
    assert with_eos_ids(params, frozenset({9, 2, 3})) == SamplingParams(stop_token_ids=(7, 3, 2, 9), temperature=0)
    assert with_eos_ids(params, frozenset({3})) is params


def test_unless_they_are_to_be_ignored() -> None:
    params = SamplingParams(ignore_eos=True)
    assert with_eos_ids(params, frozenset({2})) is params


def test_they_are_no_stop_reason() -> None:
    def event(stop_reason: int | None) -> TokenEvent:
        return TokenEvent(request_id="a", finish_reason=FinishReason.STOP, stop_reason=stop_reason)

    params = SamplingParams(stop_token_ids=(7,))
    assert stop_reason(event(7), params) == 7
    assert stop_reason(event(2), params) is None
    assert stop_reason(event(None), params) is None
