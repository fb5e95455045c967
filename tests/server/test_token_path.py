"""What runs for every token of a stream is plain code: no pydantic model is validated or dumped for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pydantic
import pytest
from pydantic_core import SchemaSerializer, SchemaValidator

from tests.server.harness import Live

PYDANTIC = str(Path(pydantic.__file__).parent)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@contextmanager
def counted(live: Live) -> Iterator[Counter[str]]:
    """What the server's thread calls of pydantic: its Python functions, and its compiled validators and serializers."""
    calls: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, function: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PYDANTIC):
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            owner = getattr(function, "__self__", None)
            if isinstance(owner, SchemaValidator | SchemaSerializer):
                calls[function.__qualname__] += 1

    live.call(lambda: sys.setprofile(watch))
    try:
        yield calls
    finally:
        live.call(lambda: sys.setprofile(None))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 5, "stop": ["zz"]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}),
        (COMPLETIONS, {"prompt": "Hi", "n": 2}),
        (COMPLETIONS, {"prompt": "Hi", "logprobs": 5, "stream_options": {"include_usage": True}}),
    ],
)
def test_a_longer_stream_calls_no_more_of_pydantic(server: Live, path: str, body: dict[str, Any]) -> None:
    (word,) = server.service.tokenizer.encode("word", add_special_tokens=False)
    server.call(lambda: setattr(server.engine, "script", lambda _: [word] * 100))
    server.chunks(path, body)  # what is built once is there now
    seen = []
    for num_tokens in (5, 60):
        with counted(server) as calls:
            chunks = server.chunks(path, body | {"max_tokens": num_tokens})
        assert len(chunks) >= num_tokens
        seen.append(calls)
    assert seen[0]
    assert seen[0] == seen[1]
