"""The command line: exit codes, one-line errors, and what reaches the engine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.child import child_environment
from engine.config import EngineConfig
from engine.sizes import params_by_kind
from engine.text import Tokenizer
from server.cli import cache_dir, main
from server.config import EdgeConfig, SamplingDefaults, ServerConfig
from server.options import build_parser, engine_config
from server.run import Prepared, listen
from tests.e2e.raw import exchange, head
from tests.e2e.running import free_port
from tests.server.conftest import MIXTRAL
from tests.tiny import TINY_MIXTRAL, tiny_tensors
from tests.weights.gguf_files import write_gguf
from tests.weights.hub_server import REPO, hub_server

ROOT = Path(__file__).parent.parent.parent

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *argv],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def parse(*argv: str) -> EngineConfig:
    def nothing(_: Any) -> int:
        return 0

    parser = build_parser(
        serve=nothing, chat=nothing, experts=nothing, plan=nothing, upcycle=nothing, bench_serve=nothing,
        bench_offline=nothing,
    )  # fmt: skip
    return engine_config(parser.parse_args(["serve", *argv]), Path("/checkpoint"))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["serve", "m", "more"],
        ["experts", "127.0.0.1:8000"],
        ["experts", "--once", "--json"],
        ["experts", "--json", "--png", "x.png"],
        ["experts", "--png"],
        ["serve", "--unknown"],
        ["serve", "--quantization", "int4"],
        ["serve", "--max-model", "5"],  # no abbreviations
        ["serve", "--port", "x"],
        ["serve", "--port", "70000"],
        ["serve", "--port", "-1"],
        ["serve", "--dtype", "int8"],
        ["serve", "--device", "tpu"],
        ["serve", "--backend", "magic"],
        ["serve", "--load-format", "pt"],
        ["serve", "--max-num-seqs", "0"],
        ["serve", "--max-model-len", "1.5"],
        ["serve", "--block-size", "-16"],
        ["serve", "--gpu-memory-utilization", "1.1"],
        ["serve", "--gpu-memory-utilization", "0"],
        ["serve", "--gpu-memory-utilization", "nan"],
        ["serve", "--kv-cache-memory-bytes", "4 bananas"],
        ["serve", "--kv-cache-memory-bytes", "0"],
        ["serve", "--shutdown-timeout", "-1"],
        ["serve", "--shutdown-timeout", "inf"],
        ["serve", "--chat-template", "/no/such/file"],
        ["serve", "--tool-call-parser", "pythonic"],
        ["serve", "--seed", "-1"],
        ["serve", "--router", "random"],
        ["serve", "--capacity-factor", "0"],
        ["serve", "--capacity-factor", "nan"],
        ["serve", "--capacity-factor", "inf"],
        ["serve", "--routing-simulation", "odd"],
        ["serve", "--record-routing=no"],
        ["chat", "model"],
        ["chat", "--url", "127.0.0.1:8000"],
        ["chat", "--url", "ftp://127.0.0.1"],
        ["chat", "--url", "http://"],
        ["chat", "--url", "http://x:99999"],
        ["chat", "--temperature", "2.1"],
        ["chat", "--max-tokens", "0"],
        ["chat", "--seed", "x"],
        ["plan"],
        ["plan", "m", "--memory", "lots"],
        ["plan", "m", "--kv-cache-dtype", "int8"],
        ["plan", "m", "--device", "tpu"],
        ["upcycle", "dense"],
        ["upcycle", "dense", "out", "--experts", "1"],
        ["upcycle", "dense", "out", "--noise", "-1"],
    ],
    ids=" ".join,
)
def test_unknown_flags_and_values_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert "usage: mixserve" in errors
    assert "Traceback" not in errors


def test_a_whole_process_exits_2_and_is_quick_about_help() -> None:
    assert run("serve", "--unknown").returncode == 2
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "chat", "plan", "upcycle"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom server.cli import main\ntry:\n    main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'pydantic', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def busy_port() -> Iterator[str]:
    with listen("127.0.0.1", 0) as sock:
        yield str(sock.getsockname()[1])


def test_a_busy_port_is_found_before_anything_is_loaded(busy_port: str, tmp_path: Path) -> None:
    """Not even the demo model is looked for: its cache stays empty."""
    result = run("serve", "--port", busy_port, MIXSERVE_CACHE=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == f"mixserve: error: cannot listen on 127.0.0.1 port {busy_port}: Address already in use\n"
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "plan", "upcycle"])
def test_no_such_model_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = {
        "serve": ["serve", str(tmp_path / "no"), "--port", "0"],
        "plan": ["plan", str(tmp_path / "no")],
        "upcycle": ["upcycle", str(tmp_path / "no"), str(tmp_path / "out")],
    }[command]
    assert main(argv) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("mixserve: error: ")
    assert errors.count("\n") == 1


def test_an_empty_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))


def test_plan_of_a_folder_with_only_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    for memory, fits in (("80GiB", False), ("141GB", True)):
        assert main(["plan", str(tmp_path), "--memory", memory, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["fits"] is fits
        assert plan["total_params"] == 46_702_792_704
        assert plan["active_params"] == 12_879_925_248
        assert plan["weight_bytes"] == 93_405_585_408
        assert plan["kv_bytes_per_token"] == 131_072
    assert main(["plan", str(tmp_path), "--memory", "80GiB", "--dtype", "float32", "--max-model-len", "1000"]) == 0
    table = capsys.readouterr().out
    assert "46,702,792,704" in table
    assert "1,000 tokens" in table


def test_plan_compares_weights_and_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    argv = ["plan", str(tmp_path), "--memory", "80GiB"]
    assert main([*argv, "--compare"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "weights"
    assert [line.split()[:2] for line in lines] == [
        [weights, cache] for weights in ("bfloat16", "fp8", "int8") for cache in ("bfloat16", "fp8")
    ]
    assert main([*argv, "--compare", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    for plan, line in zip(plans, lines, strict=True):
        assert f"{plan['max_kv_tokens']:,}" in line.split()
        options = [] if plan["quantization"] is None else ["--quantization", plan["quantization"]]
        assert main([*argv, "--json", "--kv-cache-dtype", plan["kv_cache_dtype"], *options]) == 0
        assert json.loads(capsys.readouterr().out) == plan


def test_plan_for_a_cpu_has_what_a_cpu_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    argv = ["plan", str(tmp_path), "--memory", "80GiB", "--device", "cpu", "--quantization"]
    assert main([*argv, "int8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["backend"], plan["max_num_batched_tokens"], plan["graph_bytes"]) == ("cpu", 160, 0)
    assert plan["weight_bytes"] < 47e9, "all that is large is int8"
    assert main([*argv, "fp8"]) == 1
    assert capsys.readouterr().err == "mixserve: error: backend cpu has no fp8 weights\n"


def test_plan_refuses_a_context_that_a_server_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    assert main(["plan", str(tmp_path), "--memory", "80GiB", "--max-model-len", "32769"]) == 1
    error = "max_model_len 32769 is over the model's context of 32768 tokens"
    assert capsys.readouterr().err == f"mixserve: error: {error}\n"


def test_plan_is_for_the_checkpoints_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Switch's is one expert a token, whatever num_experts_per_tok is."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B | {"router_type": "switch"}))
    assert main(["plan", str(tmp_path), "--memory", "80GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["total_params"] - plan["active_params"] == 32 * 7 * 3 * 4096 * 14336


def test_plan_of_a_repository_fetches_its_configuration_alone(tmp_path: Path) -> None:
    files = {"config.json": json.dumps(MIXTRAL_8X7B).encode(), "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    with hub_server(files) as hub:
        result = run(
            *("plan", REPO, "--memory", "141GB", "--json"),
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["total_params"] == 46_702_792_704
    assert hub.downloads == ["config.json"]


def test_plan_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "model.gguf", TINY_MIXTRAL, tiny_tensors(TINY_MIXTRAL))
    assert main(["plan", str(tmp_path / "model.gguf"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["params"] == {kind.value: count for kind, count in params_by_kind(TINY_MIXTRAL).items()}
    assert plan["max_model_len"] == TINY_MIXTRAL.max_position_embeddings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, Tokenizer]]:
    """What the serve command would serve; nothing is loaded."""
    calls: list[tuple[ServerConfig, Tokenizer]] = []

    def serve(_: socket.socket, prepare: Callable[[], Prepared], edge: EdgeConfig, __: object) -> int:
        prepared = prepare()
        assert prepared.config.edge is edge
        calls.append((prepared.config, prepared.tokenizer))
        return 0

    monkeypatch.setattr("server.run.serve", serve)
    return calls


def model_folder(path: Path) -> Path:
    """A folder with all of Mixtral 8x7B but its weights."""
    shutil.copytree(MIXTRAL, path, dirs_exist_ok=True)
    (path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return path


def test_the_served_name_and_the_defaults(served: list[tuple[ServerConfig, Tokenizer]], tmp_path: Path) -> None:
    model_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    folder = str(tmp_path)
    assert main(["serve", folder, "--port", "0"]) == 0
    assert main(["serve", folder, "--port", "0", "--served-model-name", "mine", "--shutdown-timeout", "7"]) == 0
    assert [config.served_model_name for config, _ in served] == [folder, "mine"]
    assert [config.shutdown_timeout for config, _ in served] == [ServerConfig(served_model_name="").shutdown_timeout, 7]
    assert served[0][0].sampling_defaults == SamplingDefaults(temperature=0.6)


def test_the_format_of_tool_calls(served: list[tuple[ServerConfig, Tokenizer]], tmp_path: Path) -> None:
    model_folder(tmp_path)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 0
    assert main(["serve", str(tmp_path), "--port", "0", "--tool-call-parser", "mistral"]) == 0
    assert [config.tool_call_parser for config, _ in served] == ["auto", "mistral"]


def test_another_tokenizer_and_template(served: list[tuple[ServerConfig, Tokenizer]], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}!")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    argv = ["serve", str(tmp_path), "--tokenizer", str(MIXTRAL), "--chat-template", str(template), "--port", "0"]
    assert main(argv) == 0
    tokenizer = served[0][1]
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "Hi!"


def test_the_demo_model(
    served: list[tuple[ServerConfig, Tokenizer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def demo_model(cache: Path, *, progress: bool = False) -> Path:
        assert cache == tmp_path
        assert progress
        return model_folder(tmp_path / "demo")

    monkeypatch.setattr("engine.demo.demo_model", demo_model)
    monkeypatch.setenv("MIXSERVE_CACHE", str(tmp_path))
    assert main(["serve", "--port", "0"]) == 0
    assert served[0][0].served_model_name == "mixserve-demo"


def test_upcycle_reports_what_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.upcycling import UpcycleReport

    calls: list[tuple[Any, ...]] = []

    def upcycle(*args: Any, **kwargs: Any) -> UpcycleReport:
        calls.append((args, kwargs))
        return UpcycleReport({8: 7.25, 32: 8.0}, 1.284, 1.14)

    monkeypatch.setattr("engine.upcycling.upcycle", upcycle)
    out = tmp_path / "out"
    assert main(["upcycle", "dense", str(out), "--experts", "4", "--noise", "0.05", "--seed", "9"]) == 0
    assert calls == [(("dense", out), {"num_experts": 4, "noise": 0.05, "seed": 9, "progress": True})]
    text = capsys.readouterr().out
    assert "7.2 at 8, 8.0 at 32" in text
    assert "1.28 on text, 1.14 on random ids" in text


def test_engine_options() -> None:
    assert parse() == EngineConfig(model="/checkpoint", record_routing=True), "a server records"
    assert parse("m", "--revision", "main") == parse(), "a resolved path has no revision"
    config = parse(
        *("--device", "cpu", "--dtype", "float32", "--backend", "reference", "--load-format", "dummy"),
        *("--max-model-len", "512", "--max-num-seqs", "7", "--max-num-batched-tokens", "99", "--block-size", "8"),
        *("--max-num-queued-requests", "0", "--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", "512MiB"),
        *("--no-enable-prefix-caching", "--seed", "3", "--router", "gshard", "--capacity-factor", "1.25"),
        *("--routing-simulation", "zipf", "--no-record-routing"),
    )
    assert config == EngineConfig(
        model="/checkpoint", device="cpu", dtype="float32", backend="reference", load_format="dummy", max_model_len=512,
        max_num_seqs=7, max_num_batched_tokens=99, block_size=8, max_num_queued_requests=0, gpu_memory_utilization=0.5,
        kv_cache_memory_bytes=512 * 2**20, enable_prefix_caching=False, seed=3,
        router="gshard", capacity_factor=1.25, routing_simulation="zipf", record_routing=False,
    )  # fmt: skip


def test_every_simulation_of_the_engine_is_a_choice() -> None:
    from engine.routing.simulated import SIMULATIONS

    for simulation in SIMULATIONS:
        assert parse("--routing-simulation", simulation).routing_simulation == simulation


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("2GB", 2 * 10**9), ("512MiB", 2**29), ("1000", 1000)])
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size


def test_the_cache_folder() -> None:
    home = Path.home() / ".cache" / "mixserve"
    assert cache_dir({}) == home
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/mixserve")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == home
    assert cache_dir({"XDG_CACHE_HOME": "/x", "MIXSERVE_CACHE": "/y"}) == Path("/y")
    assert cache_dir({"MIXSERVE_CACHE": "", "XDG_CACHE_HOME": ""}) == home


def test_the_keys_go_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the engine nor the process that checks grammars is given them."""
    given: list[dict[str, str]] = []

    def serve(*_: object) -> int:
        given.append(child_environment())
        return 0

    monkeypatch.setattr("server.run.serve", serve)
    monkeypatch.setenv("MIXSERVE_API_KEY", "sk-secret")
    assert main(["serve", "--port", "0"]) == 0
    assert [name for name, value in given[0].items() if "sk-secret" in value] == []


def test_a_stderr_that_nobody_reads_holds_up_nobody() -> None:
    """Each request leaves a line. The server leaves as ever, too."""
    code = (
        "import sys, time\nfrom server import cli\n"
        "cli._prepare = lambda *_: time.sleep(1000)\nsys.exit(cli.main(sys.argv[1:]))"
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", code, "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        deadline = time.monotonic() + 20
        while not listens(port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(300):
            assert exchange(url, [b"GARBAGE\r\n\r\n"], seconds=5).status_code == 400
        assert exchange(url, [head("GET", "/health")], seconds=5).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert b'"status": 400' in errors
    assert b"Invalid HTTP" not in errors, "the access log has it"


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_only_the_command_line_reads_the_environment() -> None:
    readers = [
        path.relative_to(ROOT).as_posix()
        for package in ("server", "engine", "weights")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"os\.environ|getenv", path.read_text())
    ]
    assert set(readers) <= {"server/cli.py", "engine/child.py"}, "the engine's child only hands the environment on"
