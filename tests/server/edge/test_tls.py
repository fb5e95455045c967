"""HTTPS with a certificate of the test's own."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.tls import TlsError, tls_context
from tests.e2e.raw import connection, head, post, read_answer
from tests.server.edge.certificates import make_certificate
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, live_server, parse_events


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def trust(files: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(files[0]))


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer, files: tuple[Path, Path]) -> Iterator[Live]:
    edge = EdgeConfig(max_header_bytes=4000, header_seconds=0.5, body_seconds=0.5, read_seconds=0.5)
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    info = fake_info(max_model_len=50_000, num_blocks=100_000)
    with live_server(lambda: FakeEngine(lambda _: [5] * 10, info=info), tokenizer, config, tls_context(*files)) as live:
        yield live


def test_answers_and_streams(live: Live, trust: ssl.SSLContext) -> None:
    assert live.url.startswith("https://")
    with httpx2.Client(base_url=live.url, verify=trust) as client:
        assert client.get("/health").json() == {"status": "ok"}
        response = client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
        assert parse_events(response.content)[-1] == "[DONE]"


def test_whoever_does_not_trust_it_is_told_so(live: Live) -> None:
    with httpx2.Client(base_url=live.url) as client, pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY"):
        client.get("/health")


def test_there_is_no_http_beside_it(live: Live) -> None:
    with connection(live.url) as sock:
        sock.sendall(head("GET", "/health"))
        assert not sock.recv(1000).startswith(b"HTTP")


def test_no_old_version_of_it(live: Live) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with connection(live.url) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        old.wrap_socket(sock)


def wrapped(sock: socket.socket, trust: ssl.SSLContext) -> ssl.SSLSocket:
    return trust.wrap_socket(sock, server_hostname="127.0.0.1")


def test_the_limits_hold(live: Live, trust: ssl.SSLContext) -> None:
    for request, status in (
        (head("GET", "/health", ("X-Large", "x" * 5000)), 431),
        (b"GET /health HTTP/1.1\r\n", 408),
        (post("/v1/completions", b"{}")[:-1], 408),
        (b"!!\n", 400),
    ):
        with connection(live.url) as sock, wrapped(sock, trust) as secure:
            secure.sendall(request)
            assert read_answer(secure).status_code == status
            assert secure.recv(1000) == b""


def wait_until_idle(live: Live, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while live.call(lambda: live.service.num_inflight):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_stops_reading(live: Live, trust: ssl.SSLContext) -> None:
    body = {"prompt": "Hi", "ignore_eos": True, "max_tokens": 40_000, "logprobs": 20, "stream": True}
    live.call(lambda: setattr(live.engine, "script", lambda _: [5] * 100_000))
    with connection(live.url) as sock, wrapped(sock, trust) as secure:
        secure.sendall(post("/v1/completions", json.dumps(body).encode()))
        assert secure.recv(1000)
        wait_until_idle(live)
    live.call(lambda: setattr(live.engine, "script", lambda _: [5] * 10))


def test_a_client_that_leaves(live: Live, trust: ssl.SSLContext) -> None:
    live.call(lambda: setattr(live.engine, "step_seconds", 0.1))
    body = json.dumps({"prompt": "Hi", "ignore_eos": True, "max_tokens": 200}).encode()
    with connection(live.url) as sock, wrapped(sock, trust) as secure:
        secure.sendall(post("/v1/completions", body))
        time.sleep(0.3)
        assert live.call(lambda: live.service.num_inflight) == 1
    wait_until_idle(live, seconds=1)
    live.call(lambda: setattr(live.engine, "step_seconds", 0.0))


def test_files_that_are_not_there_or_cannot_be_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = files
    for pair, wrong in (
        ((tmp_path / "no.pem", key), tmp_path / "no.pem"),
        ((certificate, tmp_path / "no.pem"), tmp_path / "no.pem"),
        ((certificate, tmp_path), tmp_path),
    ):
        with pytest.raises(TlsError) as caught:
            tls_context(*pair)
        assert str(caught.value).startswith(f"cannot read {wrong}: ")
        assert "\n" not in str(caught.value)


def test_files_that_are_no_certificate_and_its_key(files: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = files
    (tmp_path / "other").mkdir()
    other = make_certificate(tmp_path / "other")[1]
    (tmp_path / "empty").write_bytes(b"")
    for pair in (
        (key, certificate),
        (certificate, other),
        (tmp_path / "empty", key),
        (certificate, tmp_path / "empty"),
    ):
        with pytest.raises(TlsError, match="no certificate and its unencrypted key") as caught:
            tls_context(*pair)
        assert "\n" not in str(caught.value)


def test_nobody_is_asked_for_a_password(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match="unencrypted"):
        tls_context(*make_certificate(tmp_path, password="secret"))
