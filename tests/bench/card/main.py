"""Checks and times the engine on one device, and writes what it found to one JSON file.

    python tests/bench/card --out DIR                  # on a GPU: everything but tune
    python tests/bench/card --out DIR --part kernels   # one part (may be given several times)
    python tests/bench/card --out DIR --part tune      # measure tiles, and rewrite engine/backends/cuda/tiles.txt
    python tests/bench/card --out DIR --tiny           # a minute, on any machine: that the script itself works
    python tests/bench/card --out DIR --resume         # go on with what DIR/card.json lacks
    python tests/bench/card --out DIR --wheels WHEELS  # with packages for serve and peer that the machine lacks

    smoke    the backends compute what the reference computes
    kernels  every kernel against the reference, then its times
    decode   steps of Mixtral 8x7B at batches of 1 to 256, against the roofline over the experts really touched
    shapes   throughput offline, at lengths of prompts and answers that others publish
    serve    over HTTP: a server, and `mixserve bench serve` against it
    peer     the same model and prompts by transformers
    tune     the tiles of the experts, from measurements

Needs torch, numpy, safetensors, tokenizers and jinja2, Triton for its kernels, and no installation: it runs from a
checkout. Serve needs what the server needs, peer transformers; docs/performance.md says how to carry their wheels to a
machine without a network. A part begins nothing new after seven minutes; one that fails is recorded with its traceback,
the others still run, and the exit status is 1. Without a GPU the kernels run, at tiny size, in Triton's interpreter:
set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.startup import pick_device
from tests.bench.card.decode import decode
from tests.bench.card.engines import free
from tests.bench.card.peer import peer
from tests.bench.card.report import Part, Report, Setting
from tests.bench.card.serve import serve
from tests.bench.card.shapes import shapes
from tests.bench.card.smoke import smoke


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and times the engine on one device.")
    parser.add_argument("--out", type=Path, required=True, help="folder for card.json")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models only")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="default: all but tune")
    parser.add_argument("--resume", action="store_true", help="keep what card.json has, and measure what is missing")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for packages that this machine lacks")
    options = parser.parse_args(argv)
    setting = Setting(pick_device(options.device), options.tiny, options.out, options.wheels)
    head = {"machine": describe(setting.device), "tiny": options.tiny}
    try:
        report = Report(options.out / "card.json", head, resume=options.resume)
    except ValueError as error:
        parser.error(str(error))
    for name in options.part or (name for name in PARTS if name != "tune"):
        if report.is_complete(name):
            print(f"== {name} is complete", flush=True)
            continue
        print(f"== {name}", flush=True)
        part = report.part(name, anew=name in ANEW or (name in ANEW_AFTER_ERROR and report.has_failed(name)))
        try:
            PARTS[name](setting, part)
        except Exception:
            error_text = traceback.format_exc()
            print(error_text, file=sys.stderr, flush=True)
            part.end(error_text)
        else:
            part.end()
        free(setting.device)
    if report.incomplete:
        print(f"not complete, --resume goes on: {', '.join(report.incomplete)}")
    print(f"failed: {', '.join(report.failed)}" if report.failed else "all parts passed")
    return 1 if report.failed else 0


def describe(device: torch.device) -> dict[str, Any]:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
        machine["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        machine["memory_gb"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
    return machine


def kernels(setting: Setting, part: Part) -> None:
    """Every kernel against the reference, then its times."""
    if can_run_kernels(setting, part):
        from tests.bench.card.kernels import kernels

        kernels(setting, part)


def tune(setting: Setting, part: Part) -> None:
    """The tiles of the experts, from measurements."""
    if can_run_kernels(setting, part):
        from tests.bench.card.tune import tune

        tune(setting, part)


def can_run_kernels(setting: Setting, part: Part) -> bool:
    """Whether Triton is there and has a device; the report says if not. Whoever has none may run the other parts."""
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif setting.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "without a GPU they run in Triton's interpreter only: set TRITON_INTERPRET=1"
    elif setting.device.type == "cpu" and not setting.tiny:
        reason = "the interpreter is for --tiny"
    if reason is not None:
        part.leave_out("kernels", reason)
    return reason is None


PARTS: dict[str, Callable[[Setting, Part], None]] = {
    "smoke": smoke,
    "kernels": kernels,
    "decode": decode,
    "shapes": shapes,
    "serve": serve,
    "peer": peer,
    "tune": tune,
}
ANEW = frozenset({"smoke", "tune"})
"""Parts that keep no rows when they are resumed."""
ANEW_AFTER_ERROR = frozenset({"kernels"})
"""What was wrong is checked again, with all the rest."""
