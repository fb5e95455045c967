"""The flags of every command. Names follow vLLM's where the meaning is the same."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from server.bench.options import add_bench_offline_options, add_bench_serve_options
from server.config import ServerConfig
from server.edge.keys import ApiKey
from server.flags import (
    BACKENDS,
    BOOLEAN,
    COUNT,
    DTYPES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    integer,
    memory,
    number,
    server_url,
)
from server.version import VERSION
from weights.config import ROUTER_TYPES

Command = Callable[[argparse.Namespace], int]


def build_parser(
    *,
    serve: Command,
    chat: Command,
    experts: Command,
    plan: Command,
    upcycle: Command,
    bench_serve: Command,
    bench_offline: Command,
) -> argparse.ArgumentParser:
    """The parser of `mixserve`; what it parses has the chosen command in `command`."""
    parser = argparse.ArgumentParser(
        prog="mixserve",
        description="An inference server for Mixtral-style mixture-of-experts language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mixserve {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, command: Command, to: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = to.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        sub.set_defaults(command=command)
        return sub

    _add_serve_options(add("serve", "serve a model over an OpenAI-compatible HTTP API", serve))
    _add_chat_options(add("chat", "chat in the terminal with the model of a running server", chat))
    _add_experts_options(add("experts", "show what the experts of a running server do", experts))
    _add_plan_options(add("plan", "say what a model takes in memory, before anything is loaded", plan))
    _add_upcycle_options(add("upcycle", "turn a dense Llama or Mistral into a mixture of experts", upcycle))
    bench = commands.add_parser("bench", help="measure a running server, or the engine alone", allow_abbrev=False)
    kinds = bench.add_subparsers(required=True, metavar="serve|offline")
    add_bench_serve_options(add("serve", "measure what a running server does under load", bench_serve, kinds))
    add_bench_offline_options(add("offline", "measure the engine alone, in this process", bench_offline, kinds))
    return parser


def engine_config(arguments: argparse.Namespace, model: Path) -> EngineConfig:
    """The engine's options among the arguments of `serve`, for the checkpoint at `model`."""
    names = {field.name for field in fields(EngineConfig)} - {"model", "revision"}
    return EngineConfig(model=str(model), **{key: value for key, value in vars(arguments).items() if key in names})


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a checkpoint folder, a .gguf file or a Hugging Face repository id; without it, the demo model",
    )
    web = parser.add_argument_group("HTTP")
    web.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    web.add_argument("--port", type=integer(0, 65535), default=8000, help="0 for any free one; default: %(default)s")
    web.add_argument("--served-model-name", metavar="NAME", help="default: MODEL")
    web.add_argument(
        "--shutdown-timeout",
        type=number(0, math.inf),
        metavar="SECONDS",
        default=ServerConfig(served_model_name="").shutdown_timeout,
        help="how long running requests may take to finish after SIGTERM; default: %(default)s",
    )
    _add_edge_options(web)
    files = parser.add_argument_group("model files")
    files.add_argument("--revision", help="branch, tag or commit of a repository; default: main")
    files.add_argument("--tokenizer", metavar="MODEL", help="take the tokenizer from here; default: MODEL")
    files.add_argument("--chat-template", type=_text_file, metavar="FILE", help="a Jinja template, instead of MODEL's")
    files.add_argument(
        "--tool-call-parser",
        choices=("auto", "mistral", "hermes"),
        default="auto",
        help="how MODEL writes calls of tools: [TOOL_CALLS] or <tool_call>; default: as its chat template does",
    )
    files.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|FOLDER",
        help="whose sampling defaults: MODEL's, OpenAI's, or those of a folder's generation_config.json; "
        "default: %(default)s",
    )

    engine = parser.add_argument_group("engine")

    def option(flag: str, text: str, **kwargs: Any) -> None:
        """An option that EngineConfig has under the same name; its default is the one there."""
        default = getattr(_DEFAULTS, flag.removeprefix("--").replace("-", "_"))
        shown = "" if default is None else f"; default: {default}"
        engine.add_argument(flag, help=f"{text}{shown}".replace("%", "%%"), default=argparse.SUPPRESS, **kwargs)

    option("--device", "where the model runs", choices=("auto", "cpu", "cuda"))
    option("--dtype", "of weights and activations", choices=DTYPES)
    option("--backend", "what computes the layers", choices=BACKENDS)
    option("--quantization", "weights of 8 bits with scales, made while loading; default: none", choices=QUANTIZATIONS)
    option("--kv-cache-dtype", "of the KV cache: auto is the dtype, fp8 is for backend cuda", choices=KV_CACHE_DTYPES)
    option("--load-format", "dummy: random weights of the right shapes", choices=("auto", "dummy"))
    option("--max-model-len", "longest sequence in tokens; without it, the model's context", **COUNT)
    option("--max-num-seqs", "sequences in a batch", **COUNT)
    option("--max-num-batched-tokens", "tokens a step; without it, by device and model", **COUNT)
    option("--max-num-queued-requests", "requests that may wait before more are refused", type=integer(0), metavar="N")
    option("--enforce-eager", "on backend cuda, replay no CUDA graphs", action="store_true")
    option("--gpu-memory-utilization", "share of a GPU's memory to use", type=number(0, 1, above=True), metavar="SHARE")
    option(
        "--kv-cache-memory-bytes",
        "memory of the KV cache: 512MiB, 4GiB, 2GB or bytes; without it, what is left of a GPU, and on a CPU "
        "the smaller of 4 GiB and a quarter of the free memory",
        type=memory,
        metavar="SIZE",
    )
    option("--block-size", "tokens in a block of the KV cache", **COUNT)
    option("--enable-prefix-caching", "reuse the KV cache of prompts that begin alike", action=BOOLEAN)
    option("--router", "route with another router than the checkpoint's, for experiments", choices=ROUTER_TYPES)
    option(
        "--capacity-factor",
        "drop an expert's assignments over F * K * T / E in a step of T tokens; requests then depend on their "
        "neighbours, and there is no prefix caching",
        type=number(0, math.inf, above=True),
        metavar="F",
    )
    option(
        "--routing-simulation",
        "LOAD TESTS ONLY: routes without looking at the router, so that answers mean nothing",
        choices=("even", "zipf", "one"),
    )
    engine.add_argument(
        "--record-routing",
        action=BOOLEAN,
        default=True,
        help="count and trace what the routers decide; default: yes",
    )
    option("--seed", "for requests without one, and for dummy weights", type=integer(0, 2**32 - 1), metavar="N")


def _add_edge_options(web: argparse._ArgumentGroup) -> None:
    web.add_argument(
        "--api-key",
        dest="api_keys",
        type=_api_key,
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients must send; may be given again. Better: MIXSERVE_API_KEY in the environment, which no "
        "list of processes shows, with one or more keys; default: open to all",
    )
    web.add_argument(
        "--max-concurrent-per-key",
        help="requests that may generate at once for one key, or without keys for all clients together; "
        "default: no limit",
        **COUNT,
    )
    web.add_argument(
        "--root-path",
        type=_root_path,
        default="",
        metavar="PATH",
        help="the prefix under which a proxy serves the API, like /mixserve",
    )
    web.add_argument(
        "--allowed-origins",
        type=_origins,
        default=(),
        metavar="JSON",
        help="whose pages may call the API from a browser, like '[\"https://example.com\"]', or '[\"*\"]'; "
        "default: none",
    )
    web.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="certificate and chain in PEM: serve HTTPS")
    web.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its private key in PEM, without a password")


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        type=server_url,
        default="http://127.0.0.1:8000",
        help="of a running server, mixserve or another with OpenAI's API; default: %(default)s",
    )
    parser.add_argument("--model", metavar="ID", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="default: $MIXSERVE_API_KEY, else $OPENAI_API_KEY")
    parser.add_argument("--system", metavar="TEXT", default="", help="what the model is told before the conversation")
    parser.add_argument("--temperature", type=number(0, 2), metavar="T", help="default: the server's")
    parser.add_argument("--max-tokens", help="longest answer in tokens; default: the server's", **COUNT)
    parser.add_argument("--seed", type=integer(-(2**63), 2**63 - 1), metavar="N", help="for every answer")


def _add_experts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="URL",
        type=server_url,
        nargs="?",
        default="http://127.0.0.1:8000",
        help="of a running server; default: %(default)s",
    )
    parser.add_argument("--api-key", metavar="KEY", help="default: $MIXSERVE_API_KEY, else $OPENAI_API_KEY")
    parser.add_argument(
        "--since-start", action="store_true", help="of all steps since the start or a reset; default: the latest steps"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--once", dest="form", action="store_const", const="once", help="default where it is no terminal")
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one report for machines")
    form.add_argument("--png", type=Path, metavar="FILE", help="a picture for reports; needs Pillow")
    parser.set_defaults(form="live")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a config.json, a .gguf file or a repository id")
    parser.add_argument("--revision", help="branch, tag or commit of a repository; default: main")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="weights of 8 bits; default: none")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU where there is one or where --memory names its memory; default: %(default)s",
    )
    parser.add_argument("--memory", type=memory, metavar="SIZE", help="80GiB, 141GB or bytes; default: this device's")
    parser.add_argument("--max-model-len", help="longest sequence in tokens; default: the model's context", **COUNT)
    parser.add_argument(
        "--compare", action="store_true", help="every kind of weights and KV cache that the device has, side by side"
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def _add_upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dense", metavar="DENSE", help="a dense checkpoint: a folder, a .gguf file or a repository id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--experts", type=integer(2, 1024), metavar="N", default=8, help="default: %(default)s")
    parser.add_argument(
        "--noise",
        type=number(0, math.inf),
        metavar="S",
        default=0.0,
        help="noise added to each expert, in standard deviations of its tensor; default: %(default)s",
    )
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), metavar="N", default=0, help="default: %(default)s")


def _api_key(text: str) -> ApiKey:
    try:
        return ApiKey.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse's own words would quote the key


def _root_path(text: str) -> str:
    if not re.fullmatch(r"(/[\w.~-]+)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be like /mixserve, not {text}")
    return text


def _origins(text: str) -> tuple[str, ...]:
    """Without a path: no browser sends one, and what it sends is compared as a whole."""
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not origins:
        raise argparse.ArgumentTypeError(f'must be a JSON list, like ["https://example.com"], not {text}')
    for origin in origins:
        if not isinstance(origin, str) or not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            raise argparse.ArgumentTypeError(f"must hold * or origins like https://example.com, not {origin!r}")
    return tuple(origins)


def _text_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {path}: {reason}") from None


_DEFAULTS = EngineConfig(model="")
