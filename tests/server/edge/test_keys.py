"""API keys: which are accepted, and how a given one is compared."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.config import EdgeConfig
from server.edge.keys import ApiKey, find_key, keys_in

SECRETS = ["sk-first-0123456789", "sk-second", "sk-second-and-more", "!~"]
KEYS = [ApiKey.of(secret) for secret in SECRETS]


def test_each_key_is_found_and_nothing_else() -> None:
    for secret, key in zip(SECRETS, KEYS, strict=True):
        assert find_key(KEYS, secret.encode()) is key
        for other in (secret[:-1], secret + "x", secret.upper() + "A", f"{secret} {SECRETS[0]}", f" {secret}"):
            assert find_key(KEYS, other.encode()) is None
    for given in (b"", b"\xff\xfe", b"\0", b"sk", KEYS[0].digest, KEYS[0].id.encode(), b"x" * 100_000):
        assert find_key(KEYS, given) is None
    assert find_key([], b"anything") is None


@pytest.mark.parametrize("given", [*SECRETS, "", "sk-", "sk-first-0123456788", "x" * 1000])
def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """All of them, by their digests: no early end tells how far a guess was right, nor whose turn it was."""
    compared: list[tuple[bytes, bytes]] = []
    real: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    find_key(KEYS, given.encode())
    assert compared == [(key.digest, hashlib.sha256(given.encode()).digest()) for key in KEYS]


def test_nothing_but_that_comparison_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: False)
    assert [find_key(KEYS, secret.encode()) for secret in SECRETS] == [None] * 4


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb", "a\n", "\na", "é", "a\0", "a\x7f", "\udcff"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="an API key must be printable ASCII") as caught:
        ApiKey.of(key)
    assert not key.strip() or key not in str(caught.value)


def test_no_repr_tells_a_key_or_its_digest() -> None:
    config = EdgeConfig(api_keys=tuple(KEYS))
    for text in (repr(config), str(config), repr(KEYS)):
        for secret, key in zip(SECRETS, KEYS, strict=True):
            assert secret not in text.replace(key.id, "")
            assert key.digest.hex() not in text
            assert repr(key.digest) not in text


def test_ids_are_short_stable_and_no_piece_of_the_digest() -> None:
    assert len({key.id for key in KEYS}) == len(KEYS)
    for secret, key in zip(SECRETS, KEYS, strict=True):
        assert ApiKey.of(secret) == key
        assert key.id.startswith("key_")
        assert len(key.id) == 16
        assert key.id[4:] not in key.digest.hex()


def test_another_process_makes_other_ids() -> None:
    """An id in a log is no means to try keys: what it is made with is known to one process only."""
    code = "from server.edge.keys import ApiKey; print(ApiKey.of('sk-first').id)"
    root = Path(__file__).parent.parent.parent.parent
    ids = {subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() for _ in range(2)}
    assert len(ids | {ApiKey.of("sk-first").id}) == 3


@pytest.mark.parametrize("text", ["a,b", "a b", " a ,\n b ", ",a,,b,", "a\tb"])
def test_keys_of_the_environment(text: str) -> None:
    assert keys_in(text) == (ApiKey.of("a"), ApiKey.of("b"))


@pytest.mark.parametrize("text", ["", " ", ",", "a,é", "\udcff"])
def test_an_environment_without_keys_or_with_bad_ones(text: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        keys_in(text)
