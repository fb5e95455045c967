"""Two API keys share no block of the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.text import Tokenizer
from engine.validate import MAX_NAME_BYTES
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server

KEY, OTHER_KEY = "sk-first-0123456789", "sk-second-0123456789"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[Live]:
    edge = EdgeConfig(api_keys=(ApiKey.of(OTHER_KEY), ApiKey.of(KEY)))
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    with live_server(lambda: FakeEngine(lambda _: [5, 6]), tokenizer, config) as live:
        yield live


def salt(live: Live, path: str, body: dict[str, Any], key: str = "none") -> str | None:
    """What reaches the engine."""
    response = live.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    return live.call(lambda: live.engine.requests[-1].cache_salt)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", CHAT)])
def test_each_key_has_a_salt_of_its_own(locked: Live, path: str, body: dict[str, Any]) -> None:
    bodies = [body, body | {"cache_salt": "a"}, body | {"cache_salt": "b"}, body | {"cache_salt": ":a"}]
    salts = [salt(locked, path, body, key) for key in (KEY, OTHER_KEY) for body in bodies]
    assert None not in salts
    assert len(set(salts)) == 8
    assert [salt(locked, path, body, key) for key in (KEY, OTHER_KEY) for body in bodies] == salts, "the same again"


def test_both_apis_share_one_keys_blocks(locked: Live) -> None:
    assert salt(locked, "/v1/completions", {"prompt": "Hi"}, KEY) == salt(locked, "/v1/chat/completions", CHAT, KEY)


def test_it_is_neither_the_key_nor_its_digest(locked: Live) -> None:
    found = salt(locked, "/v1/completions", {"prompt": "Hi"}, KEY)
    assert found is not None
    assert KEY not in found
    assert found != ApiKey.of(KEY).digest.hex()


def test_the_longest_salt_still_fits(locked: Live) -> None:
    assert salt(locked, "/v1/completions", {"prompt": "Hi", "cache_salt": "x" * MAX_NAME_BYTES}, KEY) is not None


def test_without_keys_a_salt_is_the_clients(server: Live) -> None:
    assert salt(server, "/v1/completions", {"prompt": "Hi"}) is None
    assert salt(server, "/v1/completions", {"prompt": "Hi", "cache_salt": "a"}) == "a"


def test_no_client_can_name_the_salt_of_another_key(locked: Live) -> None:
    """What it asks for is digested with its own key."""
    other = salt(locked, "/v1/completions", {"prompt": "Hi"}, KEY)
    assert salt(locked, "/v1/completions", {"prompt": "Hi", "cache_salt": other}, OTHER_KEY) != other
