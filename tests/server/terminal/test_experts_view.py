"""Events as lines of text."""

from __future__ import annotations

import re

import pytest

from server.protocol.live import RoutingShare
from server.terminal.experts_view import Canvas, lines
from tests.server.terminal.live_event import live_event, routing_share

PLAIN, COLOURED = Canvas(80, 24, colour=False), Canvas(80, 24, colour=True)


def shown(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def with_share(share: list[list[float]]) -> RoutingShare:
    part = routing_share(len(share), len(share[0]))
    part["share"] = share
    return part


def test_the_whole_of_it() -> None:
    share = [[0.0, 0.125, 0.25, 0.625], [0.25, 0.25, 0.25, 0.25]]
    routing = {"recomputed_tokens": 0, "window": with_share(share), "total": with_share(share[::-1])}
    routing["window"]["drop_share"] = [0.0, 0.125]  # type: ignore[index]
    event = live_event(2, 4, routing=routing)
    assert lines(event, PLAIN, since_start=False) == [
        "org/model: 2 layers, top-2 of 4; 100 tokens in the latest 10 steps",
        "layer     0 1 ",
        "expert 0    ▒▒",
        "expert 1  ░░▒▒",
        "expert 2  ▒▒▒▒",
        "expert 3  ██▒▒",
        "imbalance ██▆▆",  # 2.5 and 2 of 1 to 2.5: 7 and 4.67 of 7
        "entropy   ▇▇▄▄",  # 0.9 and 0.4 of 0 to 1: 6.3 and 2.8 of 7
        "▒ even, █ twice an even share",
        "imbalance 2.25 in the mean, most 2.50 in layer 0; 1 is even",
        "entropy   65% of the most there can be, least 40% in layer 1",
        "dropped   6.2% of all choices, most 12.5% in layer 1",
        "requests  3 running, 1 waiting, 2 preempted since the start",
        "KV cache  13% in use; prefix cache 40% hits",
        "tokens/s  12.5 read, 1,234.6 generated",
        "latency   first token 20.4/31.1/1500 ms, then - (p50/p90/p99)",
        "memory    weights 3.00 GB, KV cache 1.00 GB, in all 4.10 GB of 64.00 GB",
    ]
    total = lines(event, PLAIN, since_start=True)
    assert total[0].endswith("100 tokens since the start")
    assert total[2:6] == ["expert 0  ▒▒  ", "expert 1  ▒▒░░", "expert 2  ▒▒▒▒", "expert 3  ▒▒██"]


def test_colours_say_the_same() -> None:
    event = live_event(2, 4, routing={
        "recomputed_tokens": 0, "window": with_share([[0.0, 0.25, 0.5, 0.25]] * 2), "total": routing_share(2, 4)
    })  # fmt: skip
    found = lines(event, COLOURED, since_start=False)
    numbers = [re.findall(r"48;5;(\d+)m", line) for line in found[2:6]]
    assert numbers == [["17"] * 2, ["36"] * 2, ["226"] * 2, ["36"] * 2]
    assert all(line.endswith("\x1b[0m") for line in found[2:6]), "the colour does not run on"
    plain = lines(event, PLAIN, since_start=False)
    assert [shown(line) for line in found if "expert" not in line and "even" not in line] == [
        line for line in plain if "expert" not in line and "even" not in line
    ]


@pytest.mark.parametrize("width", [5, 20, 41, 60, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (32, 8), (48, 128), (120, 1)])
def test_it_fits(width: int, colour: bool, num_layers: int, num_experts: int) -> None:
    event = live_event(num_layers, num_experts, health={"status": "busy", "message": "x" * 300})
    found = [shown(line) for line in lines(event, Canvas(width, 24, colour), since_start=False)]
    assert max(map(len, found)) < max(width, 19)
    if width >= 80:
        assert len(found) <= 24
    rows = [line for line in found if line.startswith("expert")]
    assert len(rows) == min(num_experts, 11)
    if width >= 60:
        hidden = [num_layers - (width - 11), num_experts - 11]
        told = [
            f"{number} more {name}" for number, name in zip(hidden, ("layers", "experts"), strict=True) if number > 0
        ]
        notes = [line for line in found if " in a larger terminal" in line]
        assert [note.partition(" in a")[0] for note in notes] == ([" and ".join(told)] if told else [])


def test_the_axis_names_the_columns() -> None:
    for width, num_layers in ((80, 32), (60, 32), (200, 94), (130, 94), (80, 7)):
        found = lines(live_event(num_layers, 4), Canvas(width, 24, colour=False), since_start=False)
        axis, row = found[1], found[2]
        cell = 2 if 10 + 2 * num_layers < width else 1
        for match in re.finditer(r"\d+", axis):
            place = (match.start() - 10) // cell
            assert axis[10 + place * cell :].startswith(match[0]) or len(row) - match.start() < 3
            assert int(match[0]) == place or len(row) - match.start() < 3
        assert len(re.findall(r"\d+", axis)) >= 3


def test_before_any_traffic() -> None:
    idle = routing_share(4, 8, tokens=0)
    event = live_event(
        routing={"recomputed_tokens": 0, "window": idle, "total": idle}, throughput=None,
        engine=live_event()["engine"] | {"prefix_cache_hit_rate": None},
    )  # fmt: skip
    found = lines(event, PLAIN, since_start=False)
    assert "no tokens yet" in found
    assert "tokens/s  -" in found
    assert "KV cache  13% in use; prefix cache not asked yet" in found


def test_what_the_server_says_of_itself_cannot_command_the_terminal() -> None:
    event = live_event(health={"status": "silent", "message": "not\x1b[2J well\nat all"})
    event["model"]["id"] = "\x1b]0;x\x07"
    found = lines(event, COLOURED, since_start=False)
    assert found[0].startswith("␛]0;x␇: 4 layers")
    assert found[1] == "\x1b[31mnot␛[2J well at all\x1b[0m"
    assert lines(event, PLAIN, since_start=False)[1] == "not␛[2J well at all"


def test_an_engine_that_has_not_answered_yet() -> None:
    found = lines(live_event(routing=None), PLAIN, since_start=False)
    assert found[:2] == ["org/model: 4 layers, top-2 of 8", "waiting for the engine to tell of its routing"]
    assert found[2].startswith("requests")
