"""docs/grafana.json asks for metrics that the server has, by labels that they have, in queries that parse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, Call, Expr, VectorSelector

from engine.text import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.harness import live_server

BOARD: dict[str, Any] = json.loads((Path(__file__).parent.parent.parent / "docs" / "grafana.json").read_text())
VARIABLES = {"$__rate_interval": "1m", "$__range": "30m", "$model": "fake.*"}
TARGETS: list[dict[str, Any]] = [target for panel in BOARD["panels"] for target in panel.get("targets", [])]
KNOWN = {
    *("timeseries", "table", "row"),
    *("convertFieldType", "sortBy", "groupingToMatrix"),
}


@pytest.fixture(scope="module")
def labels(tokenizer: Tokenizer) -> Iterator[dict[str, set[str]]]:
    """Of every metric that the server has once it has seen each kind of end of a request: the names of its labels."""
    with live_server(lambda: FakeEngine(lambda _: [8, 9]), tokenizer) as live:
        live.complete()
        live.post("/v1/completions", {"prompt": ""})
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(live.client.get("/metrics").text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        yield found


def parsed(target: dict[str, Any]) -> Expr:
    query: str = target["expr"]
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, "a variable that is not known"
    return promql_parser.parse(query)


def nodes(expr: Expr) -> list[Expr]:
    found: list[Expr] = []
    promql_parser.walk(expr, found.append)
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"][:60])
def test_queries(target: dict[str, Any], labels: dict[str, set[str]]) -> None:
    found = nodes(parsed(target))
    selectors = [node for node in found if isinstance(node, VectorSelector)]
    assert selectors
    for selector in selectors:
        assert selector.name in labels
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels[selector.name]
    shared = set.intersection(*(labels[selector.name or ""] for selector in selectors))
    for node in found:
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= shared
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert label in shared


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"][:60])
def test_counters_are_looked_at_by_their_rate(target: dict[str, Any]) -> None:
    found = nodes(parsed(target))
    inside: set[str | None] = set()
    for node in found:
        if isinstance(node, Call) and node.func.name in ("rate", "increase"):
            inside |= {inner.name for inner in nodes(node) if isinstance(inner, VectorSelector)}
    counters = {node.name for node in found if isinstance(node, VectorSelector) and is_counter(node.name or "")}
    assert inside == counters


def is_counter(name: str) -> bool:
    return name.endswith(("_total", "_bucket"))


def test_what_the_server_counts_is_shown(labels: dict[str, set[str]]) -> None:
    shown = {node.name for target in TARGETS for node in nodes(parsed(target)) if isinstance(node, VectorSelector)}
    ours = {
        name for name in labels if name.startswith("mixserve_") and not name.endswith(("_created", "_count", "_sum"))
    }  # fmt: skip
    assert ours - shown == {"mixserve_expert_load_cv"}, "which says the same as the imbalance"


def test_the_board_itself() -> None:
    """What Grafana's schema of a dashboard asks for, as far as this one uses it."""
    assert (BOARD["title"], BOARD["uid"]) == ("mixserve", "mixserve")
    assert 36 <= BOARD["schemaVersion"] <= 42
    assert "__inputs" not in BOARD, "it can be provisioned as it is"
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & used, f"{panel['title']} lies over another"
        used |= cells
        assert panel["type"] in KNOWN
        assert {step["id"] for step in panel.get("transformations", ())} <= KNOWN
        if panel["type"] != "row":
            assert panel["description"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource", "model"]
