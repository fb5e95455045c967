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
    from server.config import EdgeConfig
    from server.run import Prepared
    from weights.config import ModelConfig

DEMO_NAME = "mixserve-demo"
KEYS_VARIABLE = "MIXSERVE_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Exits 2 on an unknown flag or value."""
    parser = build_parser(
        serve=_serve,
        chat=_chat,
        experts=_experts,
        plan=_plan,
        upcycle=_upcycle,
        bench_serve=_bench_serve,
        bench_offline=_bench_offline,
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    command: Command = arguments.command
    try:
        return command(arguments)
    except (WeightsError, EngineError, CommandError) as error:
        print(f"mixserve: error: {error}", file=sys.stderr)
        return 1
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


class CommandError(Exception):
    """A command cannot be carried out; the message is one line."""


class UsageError(Exception):
    """Flags and environment do not go together; the message is one line."""


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where the demo model and what was typed in chats are kept.

    $MIXSERVE_CACHE, else mixserve/ in $XDG_CACHE_HOME, else in ~/.cache.
    """
    if own := environ.get("MIXSERVE_CACHE"):
        return Path(own).expanduser()
    base = environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "mixserve"


def _serve(arguments: argparse.Namespace) -> int:
    from server.edge.access_log import logs_to
    from server.edge.tls import TlsError, tls_context
    from server.run import ListenError, listen, serve

    edge = edge_config(arguments, os.environ)
    os.environ.pop(KEYS_VARIABLE, None)  # the engine and the grammar checker get what is left
    certfile, keyfile = arguments.ssl_certfile, arguments.ssl_keyfile
    if (certfile is None) != (keyfile is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile need each other")
    try:
        tls = None if certfile is None else tls_context(certfile, keyfile)
        sock = listen(arguments.host, arguments.port)
    except (TlsError, ListenError) as error:
        raise CommandError(str(error)) from None
    with sock, logs_to(sys.stderr):
        return serve(sock, partial(_prepare, arguments, edge), edge, tls)


def edge_config(arguments: argparse.Namespace, environ: Mapping[str, str]) -> EdgeConfig:
    """The keys and limits that `serve` is to have. Raises UsageError."""
    from server.config import EdgeConfig
    from server.edge.keys import keys_in

    keys = list(arguments.api_keys)
    if (text := environ.get(KEYS_VARIABLE)) is not None:
        try:
            keys += keys_in(text)
        except ValueError as error:  # also when it is empty: whoever sets it does not mean to leave the door open
            raise UsageError(f"{KEYS_VARIABLE}: {error}") from None
    return EdgeConfig(
        api_keys=tuple(dict.fromkeys(keys)),
        max_concurrent_per_key=arguments.max_concurrent_per_key,
        root_path=arguments.root_path,
        allowed_origins=arguments.allowed_origins,
    )


def _prepare(arguments: argparse.Namespace, edge: EdgeConfig) -> Prepared:
    """Find the model, which may download or build it, and load what the server itself needs of it."""
    from engine import AsyncEngine
    from engine.text import Tokenizer
    from server.config import ServerConfig
    from server.generation_config import chosen_defaults
    from server.run import Prepared
    from weights.reader import resolve

    path, name = _model(arguments.model, arguments.revision)
    tokenizer_path = path if arguments.tokenizer is None else resolve(arguments.tokenizer)
    tokenizer = Tokenizer.load(tokenizer_path, chat_template=arguments.chat_template)
    tokenizer.check_fits(_model_config(path).vocab_size)
    config = ServerConfig(
        served_model_name=arguments.served_model_name or name,
        sampling_defaults=chosen_defaults(arguments.generation_config, path),
        edge=edge,
        tool_call_parser=arguments.tool_call_parser,
        shutdown_timeout=arguments.shutdown_timeout,
    )
    engine_options = engine_config(arguments, path)
    return Prepared(config, tokenizer, lambda: AsyncEngine.start(engine_options, progress=True))


def _model(model: str | None, revision: str | None) -> tuple[Path, str]:
    """Where a model is, and what it is called; without one, the demo model. Raises WeightsError."""
    if model is None:
        from engine.demo import demo_model

        return demo_model(cache_dir(os.environ), progress=True), DEMO_NAME
    from weights.reader import resolve

    return resolve(model, revision=revision), model


def _chat(arguments: argparse.Namespace) -> int:
    from server.terminal.chat import ChatOptions, run_chat
    from server.terminal.http import ClientError
    from server.terminal.screen import printable

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request, in the midst of the chat
    options = ChatOptions(
        url=arguments.url,
        model=arguments.model,
        api_key=arguments.api_key or _client_key(os.environ),
        system=arguments.system,
        params={
            name: value
            for name in ("temperature", "max_tokens", "seed")
            if (value := getattr(arguments, name)) is not None
        },
        history=cache_dir(os.environ) / "chat_history",
        colour=not os.environ.get("NO_COLOR"),
    )
    try:
        return run_chat(options)
    except ClientError as error:
        raise CommandError(printable(str(error))) from None


def _experts(arguments: argparse.Namespace) -> int:
    from server.terminal.experts import ExpertsOptions, run_experts
    from server.terminal.http import ClientError
    from server.terminal.screen import printable

    logging.getLogger("httpx2").setLevel(logging.WARNING)
    options = ExpertsOptions(
        url=arguments.url,
        api_key=arguments.api_key or _client_key(os.environ),
        form=arguments.png or arguments.form,
        since_start=arguments.since_start,
        colour=not os.environ.get("NO_COLOR"),
        dumb=os.environ.get("TERM", "dumb") == "dumb",
    )
    try:
        return run_experts(options)
    except ClientError as error:
        raise CommandError(printable(str(error))) from None


def _client_key(environ: Mapping[str, str]) -> str | None:
    """The first of the keys that a server would have from the same environment, else OpenAI's."""
    from server.edge.keys import split_keys

    return next(iter(split_keys(environ.get(KEYS_VARIABLE, ""))), None) or environ.get("OPENAI_API_KEY")


def _plan(arguments: argparse.Namespace) -> int:
    from engine.plan import plan_model
    from engine.plan_table import comparison, table, variants
    from weights.reader import resolve

    plan = plan_model(
        _model_config(resolve(arguments.model, revision=arguments.revision, config_only=True)),
        device=arguments.device,
        dtype=None if arguments.dtype == "auto" else arguments.dtype,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        memory_bytes=arguments.memory,
        max_model_len=arguments.max_model_len,
    )
    if arguments.compare:
        plans = variants(plan)
        print(json.dumps([each.to_json_dict() for each in plans], indent=2) if arguments.json else comparison(plans))
    else:
        print(json.dumps(plan.to_json_dict(), indent=2) if arguments.json else table(plan))
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


def _bench_serve(arguments: argparse.Namespace) -> int:
    from server.bench.errors import BenchError
    from server.bench.options import PREFIX_LEN, SHARED_PREFIX
    from server.bench.prompts import Lengths
    from server.bench.serve import bench_serve
    from server.bench.workload import ServeOptions

    dataset = arguments.dataset
    if dataset != SHARED_PREFIX and (arguments.prefix_len or arguments.num_prefixes):
        raise UsageError(f"--prefix-len and --num-prefixes need --dataset {SHARED_PREFIX}")
    options = ServeOptions(
        base_url=arguments.base_url,
        model=arguments.model,
        api_key=arguments.api_key or _client_key(os.environ),
        endpoint=arguments.endpoint,
        dataset=dataset,
        num_prompts=arguments.num_prompts,
        lengths=Lengths(
            input_len=arguments.input_len,
            output_len=arguments.output_len,
            range_ratio=arguments.range_ratio,
            prefix_len=(arguments.prefix_len or PREFIX_LEN) if dataset == SHARED_PREFIX else 0,
            num_prefixes=arguments.num_prefixes or 1,
        ),
        concurrencies=arguments.sweep or (arguments.max_concurrency,),
        request_rate=arguments.request_rate,
        ignore_eos=not isinstance(dataset, Path) if arguments.ignore_eos is None else arguments.ignore_eos,
        seed=arguments.seed,
        goodput=dict(arguments.goodput),
        server_pid=arguments.server_pid,
        tokenizer=arguments.tokenizer,
    )
    try:
        bench_serve(options, json_file=arguments.json, html_file=arguments.html)
    except BenchError as error:
        raise CommandError(str(error)) from None
    return 0


def _bench_offline(arguments: argparse.Namespace) -> int:
    from server.bench.errors import BenchError
    from server.bench.offline import OfflineOptions, bench_offline

    path, name = _model(arguments.model, None)
    options = OfflineOptions(
        path=path,
        name=name,
        batches=arguments.batch,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        rounds=arguments.rounds,
        seed=arguments.seed,
        engine={key: value for key, value in vars(arguments).items() if key in ("dtype", "backend", "quantization")},
    )
    try:
        bench_offline(options, json_file=arguments.json)
    except BenchError as error:
        raise CommandError(str(error)) from None
    return 0
