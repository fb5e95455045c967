"""The HTTP client: kept connections, bodies without a length, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server.bench.http import HttpClient, HttpError, Response
from server.edge.tls import tls_context
from tests.e2e.running import free_port
from tests.server.bench.stub import Behaviour, stub_server
from tests.server.edge.certificates import make_certificate

BODY = b'{"max_tokens": 3, "prompt": [1]}'


def with_client(url: str, use: Callable[[HttpClient], Awaitable[None]], **headers: str) -> None:
    async def run() -> None:
        client = HttpClient(url, headers)
        try:
            await use(client)
        finally:
            client.close()

    asyncio.run(run())


def replying(*parts: bytes) -> Callable[[Callable[[HttpClient], Awaitable[None]]], None]:
    """Serves every connection with these bytes, a packet each, and closes it."""

    def run(use: Callable[[HttpClient], Awaitable[None]]) -> None:
        async def main() -> None:
            served: list[asyncio.Task[None] | None] = []

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                served.append(asyncio.current_task())
                await reader.readuntil(b"\r\n\r\n")
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0.01)
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
            try:
                await use(client)
            finally:
                client.close()
                await asyncio.gather(*filter(None, served))
                server.close()

        asyncio.run(main())

    return run


def test_a_connection_is_used_again_by_the_next_request_only() -> None:
    async def use(client: HttpClient) -> None:
        for _ in range(3):
            assert (await client.request("GET", "/v1/models")).status == 200
        await asyncio.gather(*(client.request("POST", "/v1/completions", BODY) for _ in range(2)))

    with stub_server(Behaviour(ttft=0.05)) as stub:
        with_client(stub.url, use)
    assert [seen.connection for seen in stub.seen[:3]] == [0, 0, 0]
    assert {seen.connection for seen in stub.seen[3:]} == {0, 1}


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async def use(client: HttpClient) -> None:
        for _ in range(3):
            assert (await client.request("POST", "/v1/completions", BODY)).status == 200

    with stub_server(Behaviour(close_kept=True)) as stub:
        with_client(stub.url, use)
    assert [seen.connection for seen in stub.generations] == [0, 1, 2]


def test_a_request_that_broke_off_is_not_sent_again() -> None:
    async def use(client: HttpClient) -> None:
        await client.request("GET", "/v1/models")
        with pytest.raises(HttpError, match="closed by the server") as error:
            await client.request("POST", "/v1/completions", BODY)
        assert error.value.kind == "connection broke"

    with stub_server(Behaviour(break_after=1)) as stub:
        with_client(stub.url, use)
    assert len(stub.generations) == 1


def test_headers_and_a_prefix_in_the_url() -> None:
    async def use(client: HttpClient) -> None:
        assert (await client.request("GET", "/v1/models")).status == 404

    with stub_server() as stub:
        with_client(f"{stub.url}/behind/proxy/", use, Authorization="Bearer key")
    (seen,) = stub.seen
    assert seen.path == "/behind/proxy/v1/models"
    assert seen.headers["authorization"] == "Bearer key"
    assert seen.headers["host"] == stub.url.removeprefix("http://")


def test_a_sink_gets_the_parts_of_a_stream_and_an_error_comes_whole() -> None:
    parts: list[bytes] = []
    times: list[float] = []

    def sink(part: bytes, now: float) -> None:
        parts.append(part)
        times.append(now)

    async def use(client: HttpClient) -> None:
        assert await client.request("POST", "/v1/completions", BODY, sink) == Response(200, b"")
        refused = await client.request("POST", "/v1/completions", BODY, sink)
        assert refused == Response(429, b'{"error": "slow down"}')

    with stub_server(
        Behaviour(itl=0.05, reply=lambda number, _: (429, {"error": "slow down"}) if number else None)
    ) as stub:
        with_client(stub.url, use)
    assert b"".join(parts).count(b"data: ") == 6
    assert 0.03 < times[-1] - times[0] < 2
    assert times == sorted(times)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async def use(client: HttpClient) -> None:
        for _ in range(2):
            assert await client.request("GET", "/") == Response(200, b"first second")

    replying(b"HTTP/1.0 200 OK\r\n\r\nfirst ", b"second")(use)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([b"SSH-2.0-OpenSSH\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"], "connection broke"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n"], "connection broke"),
        ([b"HTTP/1.1 200 OK\r\nContent-Le"], "connection broke"),
        ([], "connection broke"),
    ],
)
def test_half_an_answer_is_an_error(parts: list[bytes], kind: str) -> None:
    async def use(client: HttpClient) -> None:
        with pytest.raises(HttpError) as error:
            await client.request("GET", "/")
        assert error.value.kind == kind

    replying(*parts)(use)


def test_no_server() -> None:
    async def use(client: HttpClient) -> None:
        with pytest.raises(HttpError, match=r"^connection refused$") as error:
            await client.request("GET", "/")
        assert error.value.kind == "no connection"

    with_client(f"http://127.0.0.1:{free_port()}", use)


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the certificates that the system trusts, or those of SSL_CERT_FILE, as OpenSSL has it."""
    certificate, key = make_certificate(tmp_path)

    async def works(client: HttpClient) -> None:
        for _ in range(2):
            assert (await client.request("POST", "/v1/completions", BODY)).status == 200

    async def fails(client: HttpClient) -> None:
        with pytest.raises(HttpError, match="certificate verify failed"):
            await client.request("GET", "/v1/models")

    with stub_server(tls=tls_context(certificate, key)) as stub:
        with_client(stub.url, fails)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with_client(stub.url, works)
    assert len({seen.connection for seen in stub.generations}) == 1


def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    async def use(client: HttpClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.request("POST", "/v1/completions", BODY)
        assert (await client.request("GET", "/v1/models")).status == 200

    with stub_server(Behaviour(ttft=10)) as stub:
        with_client(stub.url, use)
    assert [seen.connection for seen in stub.seen] == [0, 1]
