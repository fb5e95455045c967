"""`mixserve experts`: as a picture in a terminal, in scripts, and where there is nothing to show."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from server.terminal.experts_picture import viridis
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, Live, live_server
from tests.server.terminal.live_event import live_event
from tests.server.terminal.pty_process import EXPERTS, ROOT, chat_environment, pty_chat
from tests.server.terminal.stub import answer, stream, stub_server
from tests.server.test_client_leaves import wait

ENVIRONMENT = chat_environment(Path("/nonexistent"), COLUMNS="80")
SIZE = (24, 80)


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    with live_server(lambda: FakeEngine(lambda _: [8] * 10, step_seconds=0.01), tokenizer) as live:
        live.complete()
        yield live


def experts(*args: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EXPERTS, *args],
        cwd=ROOT,
        env=environment or ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that is all it says."""
    assert (result.returncode, result.stdout) == (1, "")
    line, rest = result.stderr.split("\n")
    assert rest == ""
    assert line.startswith("mixserve: error: ")
    return line.removeprefix("mixserve: error: ")


@pytest.mark.parametrize("args", [(), ("--once",)])
def test_no_terminal_gets_one_report_without_colours(live: Live, args: tuple[str, ...]) -> None:
    result = experts(f"{live.url}/v1/", *args)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{MODEL}: 2 layers, top-2 of 8; ")
    assert [line[:10] for line in lines if line.startswith("expert")] == [f"expert {n}  " for n in range(8)]
    assert "\x1b" not in result.stdout
    wait(lambda: live.call(lambda: live.service.feed.num_listeners) == 0)


def test_json(live: Live) -> None:
    result = experts(live.url, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    event = json.loads(result.stdout)
    assert event["model"]["id"] == MODEL
    assert event["routing"]["total"]["tokens"] > 0


def colours(path: Path) -> list[list[Any]]:
    """Of the middle of each cell of a heatmap of four layers and eight experts, by layer."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return [[image.getpixel((86 + 32 * layer + 15, 58 + 28 * e + 13)) for e in range(8)] for layer in range(4)]


@pytest.mark.parametrize("args", [(), ("--since-start",)])
def test_a_picture(tmp_path: Path, args: tuple[str, ...]) -> None:
    event = live_event()
    assert event["routing"] is not None
    event["routing"]["total"]["share"].reverse()
    path = tmp_path / "x.dat"
    with stub_server(stream(json.dumps(event))) as stub:
        result = experts(stub.url, "--png", str(path), *args)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"Wrote {path}.\n", "")
    share = event["routing"]["total" if args else "window"]["share"]
    assert colours(path) == [[viridis(value * 8 / 2) for value in layer] for layer in share]
    assert len({colour for layer in colours(path) for colour in layer}) == 8


@pytest.mark.parametrize("event", [live_event(1, 2), live_event(94, 128)])
def test_pictures_of_other_models(tmp_path: Path, event: Any) -> None:
    with stub_server(stream(json.dumps(event))) as stub:
        assert experts(stub.url, "--png", str(tmp_path / "x.png")).returncode == 0
    with Image.open(tmp_path / "x.png") as image:
        assert 400 < image.width < 1200
        assert 200 < image.height < 1200


def test_the_scale_of_a_picture() -> None:
    assert viridis(0) == (68, 1, 84)
    assert viridis(0.5) == (33, 145, 140)
    assert viridis(1) == viridis(7) == (253, 231, 37)


def test_a_picture_that_cannot_be_written_or_drawn(tmp_path: Path) -> None:
    event = json.dumps(live_event())
    with stub_server(stream(event)) as stub:
        found = error_of(experts(stub.url, "--png", str(tmp_path / "no" / "x.png")))
        assert found == f"cannot write {tmp_path}/no/x.png: No such file or directory"
    (tmp_path / "PIL.py").write_text("raise ImportError")
    without = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    found = error_of(experts("http://127.0.0.1:9", "--png", str(tmp_path / "x.png"), environment=without))
    assert found == "--png needs Pillow, which is not installed: pip install 'mixserve[png]'"


def test_at_a_terminal(live: Live) -> None:
    with pty_chat(live.url, environment=ENVIRONMENT, command=EXPERTS, size=SIZE) as shown:
        shown.expect("\x1b[?1049h")
        shown.expect(f"{MODEL}: 2 layers, top-2 of 8; 13 tokens")
        shown.expect("\x1b[48;5;")
        live.complete()
        shown.expect("\x1b[H")
        shown.expect("26 tokens")
        shown.ctrl_c("\x1b[?1049l")
        shown.expect(f"{MODEL}: 2 layers, top-2 of 8; 26 tokens")
        assert shown.exit_code() == 0
    wait(lambda: live.call(lambda: live.service.feed.num_listeners) == 0)


def test_a_terminal_that_wants_no_colours_and_one_that_can_do_nothing(live: Live) -> None:
    with pty_chat(live.url, environment=ENVIRONMENT | {"NO_COLOR": "1"}, command=EXPERTS, size=SIZE) as shown:
        shown.expect("expert 7")
        shown.ctrl_c("\x1b[?1049l")
        assert shown.exit_code() == 0
        assert "\x1b[48" not in shown.shown
    with pty_chat(live.url, environment=ENVIRONMENT | {"TERM": "dumb"}, command=EXPERTS, size=SIZE) as shown:
        assert shown.exit_code() == 0
        assert "\x1b" not in shown.shown
        assert "expert 7" in shown.shown


def test_a_low_terminal_is_not_scrolled(live: Live) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
    with pty_chat(live.url, environment=environment, command=EXPERTS, size=(10, 40)) as shown:
        shown.expect("\x1b[J")
        frame = shown.shown.partition("\x1b[H")[2].partition("\x1b[J")[0]
        assert frame.count("\n") == 9
        shown.ctrl_c("\x1b[?1049l")


def test_an_engine_that_dies_meanwhile(live: Live) -> None:
    with pty_chat(live.url, environment=ENVIRONMENT, command=EXPERTS, size=SIZE) as shown:
        shown.expect("expert 7")
        live.call(lambda: live.engine.die("killed by SIGKILL"))
        shown.expect("\x1b[?1049l")
        shown.expect("mixserve: error: The engine is dead: killed by SIGKILL.")
        assert shown.exit_code() == 1
    assert error_of(experts(live.url)) == "The engine is dead: killed by SIGKILL."
    assert json.loads(experts(live.url, "--json").stdout)["health"]["status"] == "dead"


def test_the_end_of_a_server() -> None:
    event = json.dumps(live_event())
    for end, words in (("data: [DONE]\n\n", "the server has shut down"), ("", "the server ended the stream before")):
        with (
            stub_server(stream(event, event, end=end)) as stub,
            pty_chat(stub.url, environment=ENVIRONMENT, command=EXPERTS, size=SIZE) as shown,
        ):
            shown.expect(f"mixserve: error: {words}")
            assert shown.exit_code() == 1


def test_a_server_with_keys(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(api_keys=(ApiKey.of("sk-1"),)))
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer, config) as live:
        assert experts(live.url, "--api-key", "sk-1").returncode == 0
        assert experts(live.url, environment=ENVIRONMENT | {"MIXSERVE_API_KEY": "sk-1"}).returncode == 0
        for args in ((), ("--api-key", "sk-2")):
            assert "--api-key, MIXSERVE_API_KEY): " in error_of(experts(live.url, *args))


@pytest.mark.parametrize("form", [("--once",), ("--png", "/nonexistent/x.png")])
def test_a_server_that_records_nothing(tokenizer: Tokenizer, form: tuple[str, ...]) -> None:
    info = replace(fake_info(), record_routing=False)
    with live_server(lambda: FakeEngine(lambda _: [], info=info), tokenizer) as live:
        assert error_of(experts(live.url, *form)) == "this server does not record routing (--no-record-routing)"
        assert json.loads(experts(live.url, "--json").stdout)["routing"] is None


def test_no_server_and_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert error_of(experts(url)) == f"no server answers at {url}"
    for content, words in (
        (answer(b'{"detail": "x"}', status="404 Not Found"), "HTTP 404 Not Found"),
        (answer(b"<html>", headers="Content-Type: text/html\r\n"), "the connection broke: Expected response with"),
        (stream("x"), "the server sent what mixserve never sends: is the URL right?"),
        (stream('{"choices": []}'), "the server sent what mixserve never sends: is it of another version?"),
        (stream('{"error": {"message": "Broken\x1b."}}'.replace("\x1b", "\\u001b")), "Broken␛."),
        (stream(json.dumps(live_event(routing=None))), "the server has shut down"),
    ):
        with stub_server(content) as stub:
            assert error_of(experts(stub.url)).startswith(words)


def test_a_server_that_is_loading() -> None:
    error = {"message": "The model is still loading.", "code": "server_overloaded"}
    loading = answer(json.dumps({"error": error}).encode(), status="503 x", headers="Retry-After: 5\r\n")
    with stub_server(loading) as stub:
        assert error_of(experts(stub.url)) == "The model is still loading; try again in 5 s"


def test_an_engine_in_a_long_step_is_waited_for(live: Live) -> None:
    live.call(live.engine.pause)
    process = subprocess.Popen([*EXPERTS, live.url], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    with process:
        wait(lambda: live.call(lambda: live.engine.num_reports) == 1)
        live.call(live.engine.resume)
        assert process.stdout is not None
        assert "expert 7" in process.stdout.read()
        assert process.wait(10) == 0


def test_ctrl_c_in_a_script_and_a_reader_that_leaves(live: Live) -> None:
    live.call(live.engine.pause)
    process = subprocess.Popen([*EXPERTS, live.url], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    with process:
        wait(lambda: live.call(lambda: live.service.feed.num_listeners) == 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    live.call(live.engine.resume)
    pipe = subprocess.PIPE
    process = subprocess.Popen([*EXPERTS, live.url, "--json"], cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(10) == 1
        assert process.stderr.read() == b""
