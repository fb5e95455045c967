"""The command line: argv and environment -> configurations. Nothing else in the project reads the environment.

Whatever a command needs is imported inside it, so that `mixserve --help` is instant.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from server.options import Command, build_parser, engine_config
from weights.errors import WeightsError

if TYPE_CHECKING:
    from server.run import Prepared
    from weights.config import ModelConfig

DEMO_NAME = "mixserve-demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Exits 2 on an unknown flag or value."""
    arguments = build_parser(serve=_serve, plan=_plan, upcycle=_upcycle).parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    command: Command = arguments.command
    try:
        return command(arguments)
    except (WeightsError, EngineError, CommandError) as error:
        print(f"mixserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class CommandError(Exception):
    """A command cannot be carried out; the message is one line."""


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where the demo model is kept: $MIXSERVE_CACHE, else mixserve/ in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := environ.get("MIXSERVE_CACHE"):
        return Path(own).expanduser()
    base = environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "mixserve"


def _serve(arguments: argparse.Namespace) -> int:
    from server.run import ListenError, listen, serve

    try:
        sock = listen(arguments.host, arguments.port)
    except ListenError as error:
        raise CommandError(str(error)) from None
    with sock:
        return serve(sock, partial(_prepare, arguments))


def _prepare(arguments: argparse.Namespace) -> Prepared:
    """Find the model, which may download or build it, and load what the server itself needs of it."""
    from engine import AsyncEngine
    from engine.text import Tokenizer
    from server.config import ServerConfig
    from server.generation_config import sampling_defaults
    from server.run import Prepared
    from weights.reader import resolve

    if arguments.model is None:
        from engine.demo import demo_model

        path, name = demo_model(cache_dir(os.environ), progress=True), DEMO_NAME
    else:
        path, name = resolve(arguments.model, revision=arguments.revision), arguments.model
    tokenizer_path = path if arguments.tokenizer is None else resolve(arguments.tokenizer)
    tokenizer = Tokenizer.load(tokenizer_path, chat_template=arguments.chat_template)
    tokenizer.check_fits(_model_config(path).vocab_size)
    config = ServerConfig(
        served_model_name=arguments.served_model_name or name,
        sampling_defaults=sampling_defaults(path),
        shutdown_timeout=arguments.shutdown_timeout,
    )
    engine_options = engine_config(arguments, path)
    return Prepared(config, tokenizer, lambda: AsyncEngine.start(engine_options, progress=True))


def _plan(arguments: argparse.Namespace) -> int:
    from engine.plan import plan_model
    from weights.reader import resolve

    plan = plan_model(
        _model_config(resolve(arguments.model, revision=arguments.revision, config_only=True)),
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        memory_bytes=arguments.memory,
        max_model_len=arguments.max_model_len,
    )
    print(json.dumps(plan.to_json_dict(), indent=2) if arguments.json else plan.table())
    return 0


def _model_config(path: Path) -> ModelConfig:
    """Of a folder, which needs no more than its config.json and no torch, or of a .gguf file."""
    if path.suffix == ".gguf":
        from weights.checkpoint import open_checkpoint

        return open_checkpoint(path).config
    from weights.config import load_config

    return load_config(path)


def _upcycle(arguments: argparse.Namespace) -> int:
    from engine.upcycling import upcycle

    report = upcycle(
        arguments.dense,
        arguments.out,
        num_experts=arguments.experts,
        noise=arguments.noise,
        seed=arguments.seed,
        progress=True,
    )
    spread = ", ".join(f"{experts:.1f} at {size}" for size, experts in report.distinct_experts.items())
    print(f"Wrote {arguments.out}: {arguments.experts} experts a layer, top-2.")
    print(f"Distinct experts a layer by batch size: {spread}.")
    busiest = f"{report.imbalance_text:.2f} on text, {report.imbalance_random:.2f} on random ids"
    print(f"Load of the busiest expert over the mean: {busiest}.")
    return 0
