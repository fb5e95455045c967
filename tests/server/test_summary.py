"""What the server says when it is ready."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest

from server.summary import summary
from tests.server.fake_engine import fake_info


def test_it_says_what_was_loaded_and_where_memory_went() -> None:
    text = summary(fake_info(), model_name="the model", url="http://127.0.0.1:8000", chat=True, needs_key=False)
    for part in (
        "the model: mixtral, 3.0 M parameters, 1.0 M active",
        "top-2 of 8 experts",
        "fake backend, float32 on cpu",
        "loaded 6.00 GB in 2.0 s (3.00 GB/s)",
        "expert 5.00 GB",
        "KV cache  1.07 GB: 16,000 tokens in blocks of 16, prefix caching on",
        "routing   topk_softmax, recorded\n",
        "up to 8 sequences of 256 tokens",
        "6.07 GB of 68.72 GB",
        "http://127.0.0.1:8000",
    ):
        assert part in text


def test_it_says_how_far_the_plan_was_off() -> None:
    memory = replace(
        fake_info().memory,
        graphs=2 * 10**8,
        predicted={"weights": 48 * 10**9, "CUDA graphs": 0, "KV cache": 20 * 10**9},
        measured={"weights": 48_480_000_000, "CUDA graphs": 3_000_000, "KV cache": 19 * 10**9},
    )
    text = summary(replace(fake_info(), memory=memory), model_name="m", url="u", chat=True, needs_key=False)
    assert (
        "  measured  weights 48.48 GB (planned 48.00 GB, +1.0%), CUDA graphs 3.0 MB (planned 0.0 MB), "
        "KV cache 19.00 GB (planned 20.00 GB, -5.0%)\n"
    ) in text
    assert "6.27 GB of 68.72 GB" in text, "graphs count"


def test_nothing_measured_is_not_said() -> None:
    assert "measured" not in summary(fake_info(), model_name="m", url="u", chat=True, needs_key=False)


def test_nothing_to_load_takes_no_time() -> None:
    info = replace(fake_info(), load_seconds=0.0, load_bytes=0)
    assert "(0.00 GB/s)" in summary(info, model_name="m", url="http://x", chat=True, needs_key=False)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"record_routing": False}, "topk_softmax, not recorded"),
        ({"router": "switch"}, "switch, recorded"),
        (
            {"router": "switch", "capacity_factor": 1.25, "enable_prefix_caching": False},
            "switch, capacity factor 1.25, recorded; no prefix caching with a capacity or random draws",
        ),
        (
            {"router": "gshard", "enable_prefix_caching": False},
            "gshard, recorded; no prefix caching with a capacity or random draws",
        ),
        ({"enable_prefix_caching": False}, "topk_softmax, recorded"),  # the operator's own wish
    ],
)
def test_it_says_how_it_routes(fields: dict[str, Any], line: str) -> None:
    text = summary(replace(fake_info(), **fields), model_name="m", url="http://x", chat=True, needs_key=False)
    assert f"  routing   {line}\n" in text
    assert "SIMULATED" not in text


def test_simulated_routing_is_not_to_be_overlooked() -> None:
    info = replace(fake_info(), router="even", routing_simulation="even")
    text = summary(info, model_name="m", url="http://x", chat=True, needs_key=False)
    assert "  routing   simulated (even), recorded\n" in text
    assert "!!! ROUTING IS SIMULATED (even)" in text
    assert "answers mean nothing" in text


@pytest.mark.parametrize(("chat", "path"), [(True, "/v1/chat/completions"), (False, "/v1/completions")])
def test_the_line_to_try_is_a_command(chat: bool, path: str) -> None:
    text = summary(fake_info(), model_name='it\'s a "model"', url="http://127.0.0.1:8000", chat=chat, needs_key=False)
    (line,) = [line for line in text.splitlines() if "curl" in line]
    words = shlex.split(line)
    assert words[:3] == ["curl", "-N", f"http://127.0.0.1:8000{path}"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == 'it\'s a "model"'
    assert body["stream"] is True
