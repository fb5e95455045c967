"""Times of the last minute."""

from __future__ import annotations

from server.recent import MAX_TIMES, RecentTimes


def test_only_the_last_minute_counts() -> None:
    now = 1000.0
    times = RecentTimes(lambda: now)
    assert times.percentiles() is None
    times.note(9.0)
    now += 40
    for seconds in (0.3, 0.1, 0.2):
        times.note(seconds)
    assert times.percentiles() == {"count": 4, "p50": 0.25, "p90": 6.39, "p99": 8.739}  # as numpy.percentile
    now += 20.5
    assert times.percentiles() == {"count": 3, "p50": 0.2, "p90": 0.28, "p99": 0.298}
    now += 40
    assert times.percentiles() is None


def test_memory_is_bounded() -> None:
    times = RecentTimes(lambda: 0.0)
    for number in range(MAX_TIMES + 5):
        times.note(number)
    found = times.percentiles()
    assert found is not None
    assert found["count"] == MAX_TIMES
    assert found["p50"] == 5 + (MAX_TIMES - 1) / 2
