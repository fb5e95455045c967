"""The flags of `mixserve bench`. Names follow those of `vllm bench serve` where the meaning is the same."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from server.flags import BACKENDS, BOOLEAN, COUNT, DTYPES, QUANTIZATIONS, integer, number, server_url

RANDOM, SHARED_PREFIX = "random", "shared-prefix"
INPUT_LEN, OUTPUT_LEN, PREFIX_LEN = 128, 64, 256
LIMITED = ("ttft", "tpot", "e2el")
"""What a request has one of, so that there can be a limit."""
_SEED: dict[str, Any] = {"type": integer(0, 2**32 - 1), "metavar": "N", "default": 0}


def add_bench_serve_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url",
        type=server_url,
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="of a running server with OpenAI's API, mixserve or another; default: %(default)s",
    )
    server.add_argument("--model", metavar="ID", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help="default: $MIXSERVE_API_KEY, else $OPENAI_API_KEY")
    server.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="default: %(default)s"
    )
    server.add_argument(
        "--server-pid",
        help="of a server on this machine: sample the memory of this process and its children",
        **COUNT,
    )
    work = parser.add_argument_group("prompts")
    work.add_argument(
        "--dataset",
        type=_dataset,
        default=RANDOM,
        metavar=f"{RANDOM}|{SHARED_PREFIX}|FILE",
        help='FILE is JSONL: {"prompt": …} or, for chats, {"messages": […]}, and perhaps "max_tokens"; '
        "default: %(default)s",
    )
    work.add_argument(
        "--num-prompts", help="in a run; default: all of FILE, else 4 for each at once, at least 16", **COUNT
    )
    work.add_argument("--input-len", default=INPUT_LEN, help="tokens of a random prompt; default: %(default)s", **COUNT)
    work.add_argument("--output-len", default=OUTPUT_LEN, help="tokens of an answer; default: %(default)s", **COUNT)
    work.add_argument(
        "--range-ratio",
        type=number(0, 1),
        default=0.0,
        metavar="R",
        help="draw both lengths from length * (1 - R) to length * (1 + R); default: %(default)s",
    )
    work.add_argument(
        "--prefix-len", help=f"with {SHARED_PREFIX}: tokens in front of the input; default: {PREFIX_LEN}", **COUNT
    )
    work.add_argument("--num-prefixes", help=f"with {SHARED_PREFIX}: different ones, in turn; default: 1", **COUNT)
    work.add_argument(
        "--ignore-eos",
        action=BOOLEAN,
        default=None,
        help="answers of full length; default: yes, but with FILE no",
    )
    work.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a folder, file or repository, to draw random prompts by; default: the server's /tokenize, if it has one",
    )
    work.add_argument("--seed", help="of prompts and arrivals; default: %(default)s", **_SEED)
    load = parser.add_argument_group("load")
    at_once = load.add_mutually_exclusive_group()
    at_once.add_argument("--max-concurrency", help="requests at once; default: no limit", **COUNT)
    at_once.add_argument("--sweep", type=_counts, metavar="N,N,…", help="one run for each number of requests at once")
    load.add_argument(
        "--request-rate",
        type=number(0, math.inf, above=True),
        metavar="R",
        help="requests a second, arriving by chance (Poisson); default: as many at once as may be",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--goodput",
        type=_limit,
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="limits that a good request keeps, like ttft:500 tpot:50 e2el:5000",
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts")


def add_bench_offline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a checkpoint folder, a .gguf file or a Hugging Face repository id; without it, the demo model",
    )
    parser.add_argument("--batch", type=_counts, default=(1, 8, 16, 32), metavar="N,N,…", help="default: 1,8,16,32")
    parser.add_argument("--input-len", default=INPUT_LEN, help="tokens of a prompt; default: %(default)s", **COUNT)
    parser.add_argument(
        "--output-len",
        type=integer(2),
        metavar="N",
        help="tokens of an answer; default: 64 for batches of up to 8, else 32",
    )
    parser.add_argument("--rounds", default=3, help="for a median; default: %(default)s", **COUNT)
    # Fields of EngineConfig, with its defaults.
    parser.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS, help="default: the checkpoint's")
    parser.add_argument("--backend", choices=BACKENDS, default=argparse.SUPPRESS, help="default: auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default=argparse.SUPPRESS, help="default: none")
    parser.add_argument("--seed", help="of the prompts; default: %(default)s", **_SEED)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")


def _dataset(text: str) -> str | Path:
    if text in (RANDOM, SHARED_PREFIX):
        return text
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be {RANDOM}, {SHARED_PREFIX} or a JSONL file, not {text}")
    return Path(text)


def _counts(text: str) -> tuple[int, ...]:
    one = integer(1)
    return tuple(one(part) for part in text.split(","))


def _limit(text: str) -> tuple[str, float]:
    metric, _, limit = text.partition(":")
    if metric not in LIMITED:
        raise argparse.ArgumentTypeError(f"must be like ttft:500, with one of {', '.join(LIMITED)}, not {text}")
    return metric, number(0, math.inf)(limit)
