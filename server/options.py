"""The flags of every command. Names follow vLLM's where the meaning is the same."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from server.config import ServerConfig
from server.version import VERSION
from weights.config import ROUTER_TYPES

Command = Callable[[argparse.Namespace], int]


def build_parser(*, serve: Command, plan: Command, upcycle: Command) -> argparse.ArgumentParser:
    """The parser of `mixserve`; what it parses has the chosen command in `command`."""
    parser = argparse.ArgumentParser(
        prog="mixserve",
        description="An inference server for Mixtral-style mixture-of-experts language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mixserve {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, command: Command) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    _add_serve_options(add("serve", "serve a model over an OpenAI-compatible HTTP API", serve))
    _add_plan_options(add("plan", "say what a model takes in memory, before anything is loaded", plan))
    _add_upcycle_options(add("upcycle", "turn a dense Llama or Mistral into a mixture of experts", upcycle))
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
    web.add_argument("--port", type=_integer(0, 65535), default=8000, help="0 for any free one; default: %(default)s")
    web.add_argument("--served-model-name", metavar="NAME", help="default: MODEL")
    web.add_argument(
        "--shutdown-timeout",
        type=_number(0, math.inf),
        metavar="SECONDS",
        default=ServerConfig(served_model_name="").shutdown_timeout,
        help="how long running requests may take to finish after SIGTERM; default: %(default)s",
    )
    files = parser.add_argument_group("model files")
    files.add_argument("--revision", help="branch, tag or commit of a repository; default: main")
    files.add_argument("--tokenizer", metavar="MODEL", help="take the tokenizer from here; default: MODEL")
    files.add_argument("--chat-template", type=_text_file, metavar="FILE", help="a Jinja template, instead of MODEL's")

    engine = parser.add_argument_group("engine")

    def option(flag: str, text: str, **kwargs: Any) -> None:
        """An option that EngineConfig has under the same name; its default is the one there."""
        default = getattr(_DEFAULTS, flag.removeprefix("--").replace("-", "_"))
        shown = "" if default is None else f"; default: {default}"
        engine.add_argument(flag, help=f"{text}{shown}".replace("%", "%%"), default=argparse.SUPPRESS, **kwargs)

    option("--device", "where the model runs", choices=("auto", "cpu", "cuda"))
    option("--dtype", "of weights and KV cache", choices=("auto", "float32", "float16", "bfloat16"))
    option("--backend", "what computes the layers", choices=("auto", "torch", "reference"))
    option("--load-format", "dummy: random weights of the right shapes", choices=("auto", "dummy"))
    option("--max-model-len", "longest sequence in tokens; without it, the model's context", **_COUNT)
    option("--max-num-seqs", "sequences in a batch", **_COUNT)
    option("--max-num-batched-tokens", "tokens a step", **_COUNT)
    option("--max-num-queued-requests", "requests that may wait before more are refused", type=_integer(0), metavar="N")
    option(
        "--gpu-memory-utilization", "share of a GPU's memory to use", type=_number(0, 1, above=True), metavar="SHARE"
    )
    option(
        "--kv-cache-memory-bytes",
        "memory of the KV cache: 512MiB, 4GiB, 2GB or bytes; without it, what is left of a GPU, and on a CPU "
        "the smaller of 4 GiB and a quarter of the free memory",
        type=_memory,
        metavar="SIZE",
    )
    option("--block-size", "tokens in a block of the KV cache", **_COUNT)
    option("--enable-prefix-caching", "reuse the KV cache of prompts that begin alike", action=_BOOLEAN)
    option("--router", "route with another router than the checkpoint's, for experiments", choices=ROUTER_TYPES)
    option(
        "--capacity-factor",
        "drop an expert's assignments over F * K * T / E in a step of T tokens; requests then depend on their "
        "neighbours, and there is no prefix caching",
        type=_number(0, math.inf, above=True),
        metavar="F",
    )
    option(
        "--routing-simulation",
        "LOAD TESTS ONLY: routes without looking at the router, so that answers mean nothing",
        choices=("even", "zipf", "one"),
    )
    engine.add_argument(
        "--record-routing",
        action=_BOOLEAN,
        default=True,
        help="count and trace what the routers decide; default: yes",
    )
    option("--seed", "for requests without one, and for dummy weights", type=_integer(0, 2**32 - 1), metavar="N")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a config.json, a .gguf file or a repository id")
    parser.add_argument("--revision", help="branch, tag or commit of a repository; default: main")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    parser.add_argument("--memory", type=_memory, metavar="SIZE", help="80GiB, 141GB or bytes; default: this device's")
    parser.add_argument("--max-model-len", help="longest sequence in tokens; default: the model's context", **_COUNT)
    parser.add_argument("--json", action="store_true", help="for machines")


def _add_upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dense", metavar="DENSE", help="a dense checkpoint: a folder, a .gguf file or a repository id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--experts", type=_integer(2, 1024), metavar="N", default=8, help="default: %(default)s")
    parser.add_argument(
        "--noise",
        type=_number(0, math.inf),
        metavar="S",
        default=0.0,
        help="noise added to each expert, in standard deviations of its tensor; default: %(default)s",
    )
    parser.add_argument("--seed", type=_integer(0, 2**32 - 1), metavar="N", default=0, help="default: %(default)s")


def _integer(low: int, high: int = 2**40) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {value}")
        return value

    return integer


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above else 'at least'} {low} and finite, up to {high}"
            )
        return value

    return number


def _memory(text: str) -> int:
    from engine.plan import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _text_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {path}: {reason}") from None


_DEFAULTS = EngineConfig(model="")
_BOOLEAN = argparse.BooleanOptionalAction
_COUNT: dict[str, Any] = {"type": _integer(1), "metavar": "N"}
