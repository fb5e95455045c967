"""Part "serve": over HTTP, `mixserve bench serve` against `mixserve serve` on this machine, with random weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.card.engines import Variant, config_of, formats, model_folder
from tests.bench.card.packages import ROOT, environment_with
from tests.bench.card.report import BUILD_SECONDS, Part, Setting
from weights.config import ModelConfig

NEEDED = (
    "fastapi",
    "httptools",
    "huggingface_hub",
    "llguidance",
    "msgspec",
    "prometheus_client",
    "pydantic",
    "tqdm",
    "uvicorn",
)
TOKENIZER = ROOT / "tests" / "golden" / "mixtral-8x7b"
STOP_SECONDS = 30.0
LEAST_TOKENS = 64 * 1000
"""Of the KV cache, or a model is not worth a run."""
FIGURES = (
    *("completed", "failed", "duration", "request_throughput", "output_throughput", "total_token_throughput"),
    *(f"{spread}_{metric}_ms" for metric in ("ttft", "tpot", "itl") for spread in ("median", "p99")),
    "cached_input_tokens",
)
"""What a row takes of the JSON of `bench serve`, under its names."""


@dataclass(frozen=True, slots=True)
class Sizes:
    concurrencies: tuple[int, ...]
    input_len: int
    output_len: int
    prompts_per_stream: int
    least_prompts: int
    max_model_len: int


SIZES = Sizes((1, 8, 32, 128), 512, 128, 4, 16, 2048)
TINY_SIZES = Sizes((1, 2), 16, 4, 1, 2, 64)


def serve(setting: Setting, part: Part) -> None:
    """Tables: servers; serve, a row for each number of requests at once; failed, the same where some did."""
    sizes = TINY_SIZES if setting.tiny else SIZES
    part.set(input_len=sizes.input_len, output_len=sizes.output_len)
    variant = Variant(*formats(setting)[0], "even")
    missing = [n for n in sizes.concurrencies if not part.rows("serve", **variant.keys, concurrency=n)]
    with environment_with(setting, part, NEEDED) as environment:
        if environment is None or not missing or not part.has_time(str(variant), seconds=BUILD_SECONDS):
            return
        config = config_of(setting, part, variant, LEAST_TOKENS)
        if config is None:
            return
        failed = 0
        with _server(setting, part, variant, config, sizes, environment) as url:
            for concurrency in missing:
                if part.has_time(f"{concurrency} at once"):
                    figures = _load(part, url, sizes, concurrency, environment)
                    table = "serve" if figures["failed"] == 0 else "failed"  # which the next run tries again
                    part.row(table, **variant.keys, concurrency=concurrency, **figures)
                    failed += figures["failed"]
    assert failed == 0, f"{failed} requests failed"


@contextmanager
def _server(
    setting: Setting,
    part: Part,
    variant: Variant,
    config: ModelConfig,
    sizes: Sizes,
    environment: Mapping[str, str],
) -> Iterator[str]:
    """A server that is ready: its URL. Whatever happens, it and its engine end; its log is DIR/serve.log."""
    port = _free_port()
    options = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "mixtral",
        "device": setting.device.type,
        "backend": "cuda" if setting.device.type == "cuda" else "auto",
        "load-format": "dummy",
        "routing-simulation": variant.simulation,
        "kv-cache-dtype": variant.kv_cache_dtype,
        "quantization": variant.quantization,
        "max-model-len": sizes.max_model_len,
    }
    with model_folder(config) as folder:
        _add_tokenizer(folder, tiny=setting.tiny)
        arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
        start = time.perf_counter()
        with (setting.out / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", str(folder), *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its engine can be ended with it
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, part, setting.out / "serve.log")
            if not part.rows("servers", **variant.keys):
                ready_seconds = time.perf_counter() - start
                part.row("servers", **variant.keys, num_layers=config.num_layers, ready_seconds=ready_seconds)
            yield url
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _add_tokenizer(folder: Path, *, tiny: bool) -> None:
    if tiny:
        from tests.tiny_tokenizer import write_byte_tokenizer

        write_byte_tokenizer(folder)
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, part: Part, log: Path) -> None:
    while part.seconds_left > 0:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}: {_end_of(log)}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):  # not listening yet, or 503
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {part.seconds:.0f} seconds: {_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As an operator does; what is left of its session after that is killed."""
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _load(part: Part, url: str, sizes: Sizes, concurrency: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """One run of `bench serve`, which warms up by itself. Its prompts are of its own seed: none is in the prefix cache
    from the run before."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        options = {
            "base-url": url,
            "max-concurrency": concurrency,
            "num-prompts": max(sizes.least_prompts, sizes.prompts_per_stream * concurrency),
            "input-len": sizes.input_len,
            "output-len": sizes.output_len,
            "seed": concurrency,
            "json": file,
        }
        result = subprocess.run(
            [sys.executable, "-m", "server", "bench", "serve", *(f"--{name}={text}" for name, text in options.items())],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=part.most_seconds,
        )
        if result.returncode != 0:
            raise RuntimeError(f"bench serve failed: {result.stdout}{result.stderr}")
        (run,) = json.loads(file.read_text())["runs"]
    return {name: run[name] for name in FIGURES}
