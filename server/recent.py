"""How long things took of late: times of the last minute, for percentiles that follow what happens now."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from server.percentile import percentile
from server.protocol.live import Percentiles

RECENT_SECONDS = 60
MAX_TIMES = 8192


class RecentTimes:
    """The times that were noted in the last RECENT_SECONDS, the latest MAX_TIMES of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._noted: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)  # (when, how long)

    def note(self, seconds: float) -> None:
        """Something has just ended that took `seconds`."""
        self._noted.append((self._clock(), seconds))

    def percentiles(self) -> Percentiles | None:
        """In seconds, with 6 decimals; None of nothing."""
        oldest = self._clock() - RECENT_SECONDS
        while self._noted and self._noted[0][0] < oldest:
            self._noted.popleft()
        if not self._noted:
            return None
        ordered = sorted(seconds for _, seconds in self._noted)
        p50, p90, p99 = (round(percentile(ordered, percent), 6) for percent in (50, 90, 99))
        return {"count": len(ordered), "p50": p50, "p90": p90, "p99": p99}
