"""The flags and the variable that say who may come in: what reaches the server, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from server.cli import main
from server.config import EdgeConfig, SamplingDefaults, ServerConfig
from server.edge.keys import ApiKey
from server.run import Prepared
from tests.server.conftest import MIXTRAL
from tests.server.edge.certificates import make_certificate
from tests.server.test_cli import MIXTRAL_8X7B

Served = list[tuple[ServerConfig, ssl.SSLContext | None]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What the serve command would serve; nothing is loaded."""
    calls: Served = []

    def serve(
        _: socket.socket, prepare: Callable[[], Prepared], edge: EdgeConfig, tls: ssl.SSLContext | None = None
    ) -> int:
        config = prepare().config
        assert config.edge is edge
        calls.append((config, tls))
        return 0

    monkeypatch.setattr("server.run.serve", serve)
    monkeypatch.delenv("MIXSERVE_API_KEY", raising=False)
    return calls


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with all of Mixtral 8x7B but its weights."""
    folder = tmp_path / "model"
    shutil.copytree(MIXTRAL, folder)
    (folder / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return str(folder)


def test_defaults(served: Served, model: str) -> None:
    assert main(["serve", model, "--port", "0"]) == 0
    config, tls = served[0]
    assert config.edge == EdgeConfig()
    assert tls is None


def test_all_of_them(served: Served, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXSERVE_API_KEY", "c, d\nb")
    certificate, key = make_certificate(tmp_path)
    argv = [
        *("serve", model, "--port", "0", "--api-key", "a", "--api-key=b", "--max-concurrent-per-key", "3"),
        *("--root-path", "/mixserve/v2", "--allowed-origins", '["https://a.example", "http://localhost:3000"]'),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
    ]
    assert main(argv) == 0
    config, tls = served[0]
    assert config.edge == EdgeConfig(
        api_keys=tuple(ApiKey.of(key) for key in "abcd"),
        max_concurrent_per_key=3,
        root_path="/mixserve/v2",
        allowed_origins=("https://a.example", "http://localhost:3000"),
    )
    assert tls is not None


@pytest.mark.parametrize(
    ("choice", "defaults"),
    [("auto", SamplingDefaults(temperature=0.6)), ("vllm", SamplingDefaults()), ("FOLDER", SamplingDefaults(top_k=7))],
)
def test_whose_generation_config(
    served: Served, model: str, tmp_path: Path, choice: str, defaults: SamplingDefaults
) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 7}')
    argv = ["serve", model, "--port", "0", "--generation-config", choice.replace("FOLDER", str(tmp_path))]
    assert main(argv) == 0
    assert served[0][0].sampling_defaults == defaults


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", ""],
        ["--api-key", "a b"],
        ["--api-key", "ké"],
        ["--api-key"],
        ["--max-concurrent-per-key", "0"],
        ["--max-concurrent-per-key", "x"],
        ["--root-path", "mixserve"],
        ["--root-path", "/mixserve/"],
        ["--root-path", "/"],
        ["--root-path", "/a//b"],
        ["--root-path", "/a?b"],
        ["--allowed-origins", "https://a.example"],
        ["--allowed-origins", "[]"],
        ["--allowed-origins", "[5]"],
        ["--allowed-origins", '["a.example"]'],
        ["--allowed-origins", '["https://a.example/"]'],
        ["--allowed-origins", '["https://a.example/path"]'],
        ["--allowed-origins", '["https://*.example"'],
        ["--ssl-certfile", "x"],
        ["--ssl-keyfile", "x"],
        ["--allow-credentials"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_exits_2(argv: list[str], served: Served, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["serve", model, "--port", "0", *argv])
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert "usage: mixserve" in errors
    assert "Traceback" not in errors
    assert served == []


@pytest.mark.parametrize("value", ["", " ", ",", "good,sécret", "good\x07"])
def test_a_variable_without_keys_or_with_bad_ones_exits_2(
    value: str, served: Served, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty secret must not leave the door open."""
    monkeypatch.setenv("MIXSERVE_API_KEY", value)
    with pytest.raises(SystemExit) as exit_info:
        main(["serve", model, "--port", "0"])
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mixserve: error: MIXSERVE_API_KEY: ")
    assert "good" not in last
    assert served == []


def test_a_bad_key_is_not_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--api-key", "secret with spaces"])
    assert "secret with" not in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["certificate", "key", "generation"])
def test_files_that_cannot_be_read_exit_1_with_one_line(
    wrong: str, served: Served, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = make_certificate(tmp_path)
    no = tmp_path / "no"
    argv = ["serve", model, "--port", "0"]
    if wrong == "generation":
        argv += ["--generation-config", str(no)]
    else:
        argv += ["--ssl-certfile", str(no if wrong == "certificate" else certificate)]
        argv += ["--ssl-keyfile", str(no if wrong == "key" else key)]
    assert main(argv) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("mixserve: error: ")
    assert str(no) in errors
    assert errors.count("\n") == 1
    assert served == []


def test_help_recommends_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "MIXSERVE_API_KEY" in capsys.readouterr().out
