"""The HTML report stands alone, is well-formed, and says what was measured."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.chart import Line, Point, _ticks, line_chart
from server.bench.metrics import ErrorCount
from server.bench.prompts import Lengths
from server.bench.report import html_report
from tests.server.bench.runs import JSONL, make_measured, make_run


def page(html: str) -> ElementTree.Element:
    """The page as a tree: it is written so that an XML parser, which forgives nothing, can read it."""
    head = "<!doctype html>\n"
    assert html.startswith(head)
    return ElementTree.fromstring(html.removeprefix(head))


def words(html: str) -> str:
    body = page(html).find("body")
    assert body is not None
    return " ".join(" ".join(body.itertext()).split())


def test_it_needs_nothing_from_anywhere() -> None:
    html = html_report(make_measured())
    assert not re.search(r"https?:|//|url\(|@import|\bsrc=|\bhref=|<script|<link|<iframe", html)
    page(html)


def test_light_and_dark() -> None:
    html = html_report(make_measured())
    assert "color-scheme: light dark" in html
    dark = html.partition("@media (prefers-color-scheme: dark)")[2]
    light = html.partition(":root {")[2].partition("}")[0]
    names = set(re.findall(r"--[\w]+(?=:)", light))
    assert names
    assert names == set(re.findall(r"--[\w]+(?=:)", dark.partition("} }")[0])), "each colour has both"
    assert set(re.findall(r"var\((--\w+)\)", html)) <= names


def test_every_figure_is_there() -> None:
    text = words(html_report(make_measured()))
    for part in ("demo", "127.0.0.1:8000", "128 input tokens, 64 output tokens", "2026-11-24 12:00 UTC"):
        assert part in text
    for run in (make_run(1), make_run(8), make_run(32)):
        spread = run.spreads["ttft"]
        assert spread is not None
        assert f"{run.output_throughput:.1f}" in text
        assert f"{spread.mean:.1f} {spread.median:.1f} {spread.p90:.1f} {spread.p99:.1f}" in text
    assert "HTTP 503 2 busy" in text
    assert "at most 1.95 GB" in text


def test_curves_and_the_memory_line() -> None:
    html = html_report(make_measured())
    figures = page(html).findall(".//figure")
    titles = [figure.findtext("h2") for figure in figures]
    assert titles == [
        "End-to-end latency over throughput",
        "Time to first token over throughput",
        "Time per output token over throughput",
        "Memory of the server",
    ]
    *curves, memory = figures
    for curve in curves:
        lines = [line.get("points", "").split() for line in curve.iter("polyline")]
        assert [len(points) for points in lines] == [3, 3]
        assert [label.text for label in curve.iter("text") if label.get("class") == "label"] == ["1", "8", "32"]
        assert len(list(curve.iter("circle"))) == 6
        assert "8 at once: 1024.0 tokens/s, 156.0 ms" in [tip.text for tip in curve.iter("title")]
    (line,) = memory.iter("polyline")
    assert len(line.get("points", "").split()) == 20


def test_without_memory_or_answers_of_several_tokens() -> None:
    run = make_run(None, request_rate=2.5, spreads={**make_run(1).spreads, "tpot": None, "itl": None})
    html = html_report(make_measured(run, memory=False))
    titles = [figure.findtext("h2") for figure in page(html).findall(".//figure")]
    assert titles == ["End-to-end latency over throughput", "Time to first token over throughput"]
    assert "all 2.5 20 0" in words(html)


def test_what_others_wrote_is_escaped() -> None:
    evil = '</title><script>alert("&")</script>'
    run = make_run(8, failed=1, errors={evil: ErrorCount(1, evil)})
    html = html_report(make_measured(run, model=evil, base_url=f"http://x/{evil}"))
    assert "<script" not in html
    assert words(html).count(evil) == 4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dataset": JSONL}, "prompts.jsonl prompts, 64 output tokens"),
        (
            {
                "dataset": "shared-prefix",
                "lengths": Lengths(input_len=8, output_len=4, range_ratio=0.25, prefix_len=99),
            },
            "shared-prefix prompts, 99 shared and 8 input tokens, 4 output tokens, both ±25%",
        ),
    ],
)
def test_the_work_is_named(fields: dict[str, Any], text: str) -> None:
    assert text in words(html_report(make_measured(**fields)))


@given(st.floats(0, 1e12, allow_subnormal=False))
def test_ticks_are_few_round_and_reach_the_highest(highest: float) -> None:
    ticks = _ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8
    if highest > 1e-6:
        assert ticks[-2] < highest
        step = ticks[1] / 10 ** len(str(int(ticks[1])))
        assert f"{ticks[1]:.6e}"[0] in "125", step


def test_points_lie_where_they_should() -> None:
    points = [Point(0, 0), Point(100, 50), Point(50, 25)]
    svg = ElementTree.fromstring(line_chart([Line("a", "one", points)], title="t", x_title="x", y_title="y"))
    (line,) = svg.iter("polyline")
    origin, end, middle = (tuple(map(float, place.split(","))) for place in line.get("points", "").split())
    assert middle == pytest.approx(((origin[0] + end[0]) / 2, (origin[1] + end[1]) / 2), abs=0.1)
    assert origin[0] < end[0]
    assert origin[1] > end[1], "up is more"
    assert svg.get("aria-label") == "t"
