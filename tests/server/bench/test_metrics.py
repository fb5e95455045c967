"""Figures against values computed by hand, and percentiles against numpy's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.bench.answer import Answer, Failure, Outcome
from server.bench.metrics import ErrorCount, RunResult, Spread, summarize


def answer(ttft: float, itls: list[float], output_tokens: int | None = None, **more: Any) -> Answer:
    return Answer(
        ttft=ttft,
        itls=itls,
        latency=ttft + sum(itls),
        output_tokens=1 + len(itls) if output_tokens is None else output_tokens,
        **{"input_tokens": 10, **more},
    )


def result(*outcomes: Outcome, duration: float = 2.0, goodput: dict[str, float] | None = None) -> RunResult:
    return summarize(
        [(7, outcome) for outcome in outcomes],
        duration=duration,
        goodput=goodput or {},
        max_concurrency=4,
        request_rate=None,
        client_cpu=0.1,
        peak_memory_bytes=123,
    )


# TTFT 100, 300 ms; end-to-end 400, 1100 ms; TPOT 300 / 3 = 100 and 800 / 4 = 200 ms.
FIRST, SECOND = answer(0.1, [0.1, 0.05, 0.15]), answer(0.3, [0.2, 0.2, 0.4], output_tokens=5)


def test_by_hand() -> None:
    run = result(FIRST, SECOND)
    assert (run.completed, run.failed, run.total_input_tokens, run.total_output_tokens) == (2, 0, 20, 9)
    assert (run.request_throughput, run.input_throughput, run.output_throughput) == (1.0, 10.0, 4.5)
    expected = {
        "ttft": Spread(200, 200, 280, 298),
        "tpot": Spread(150, 150, 190, 199),
        # 50, 100, 150, 200, 200, 400: place 4.5 for the 90th percentile, 4.95 for the 99th
        "itl": Spread(1100 / 6, 175, 300, 390),
        "e2el": Spread(750, 750, 1030, 1093),
    }
    for metric, value in expected.items():
        found = run.spreads[metric]
        assert found is not None
        assert [found.mean, found.median, found.p90, found.p99] == pytest.approx(
            [value.mean, value.median, value.p90, value.p99]
        )


def test_only_whole_answers_count() -> None:
    failures = [Failure("HTTP 503", "busy"), Failure("broken off", "x"), Failure("HTTP 503", "still busy")]
    run = result(failures[0], FIRST, *failures[1:])
    assert (run.completed, run.failed, run.total_output_tokens, run.request_throughput) == (1, 3, 4, 0.5)
    assert run.errors == {"HTTP 503": ErrorCount(2, "busy"), "broken off": ErrorCount(1, "x")}
    assert list(run.errors) == ["HTTP 503", "broken off"], "the most frequent first"


def test_nothing_has_succeeded() -> None:
    run = result(Failure("x", "y"), goodput={"ttft": 1})
    assert all(value is None for value in run.spreads.values())
    assert (run.output_throughput, run.request_goodput) == (0, 0)
    assert run.to_json()["mean_tpot_ms"] is None


def test_one_token_has_no_tpot() -> None:
    found = result(answer(0.1, []), FIRST).spreads["tpot"]
    assert found is not None
    assert found.mean == pytest.approx(100)
    assert result(answer(0.1, [])).spreads["tpot"] is None


@pytest.mark.parametrize(
    ("goodput", "good"),
    [
        ({"ttft": 500}, 3),
        ({"ttft": 100}, 2),  # the limit itself is good
        ({"ttft": 99}, 0),
        ({"tpot": 150}, 2),  # an answer of one token keeps any
        ({"e2el": 1200, "tpot": 150}, 2),
        ({"e2el": 300}, 1),
        ({"ttft": 200, "tpot": 500, "e2el": 350}, 1),
    ],
    ids=str,
)
def test_goodput(goodput: dict[str, float], good: int) -> None:
    run = result(answer(0.1, []), FIRST, SECOND, Failure("x", "y"), goodput=goodput)
    assert run.request_goodput == good / 2


def test_without_limits_there_is_no_goodput() -> None:
    assert result(FIRST).request_goodput is None


def test_what_the_server_does_not_count() -> None:
    run = result(answer(0.1, [0.1], input_tokens=None, counted=False), answer(0.1, [0.1], cached_tokens=8))
    assert (run.total_input_tokens, run.cached_input_tokens, run.counted) == (17, 8, False)
    unknown = summarize(
        [(None, answer(0.1, [], input_tokens=None))],
        duration=1,
        goodput={},
        max_concurrency=None,
        request_rate=5.0,
        client_cpu=0,
        peak_memory_bytes=None,
    )
    assert unknown.total_input_tokens == 0


def test_json_is_flat_and_finite() -> None:
    fields = result(FIRST, SECOND, Failure("x", "y"), goodput={"ttft": 200}).to_json()
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["errors"] == {"x": {"count": 1, "message": "y"}}
    assert fields["total_token_throughput"] == 14.5
    assert fields["request_goodput"] == 0.5
    assert fields["p99_ttft_ms"] == pytest.approx(298)
    assert fields["output_tokens_counted_by"] == "server"
