"""The demo model, for whoever starts without a model: built on first use, found without torch afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from weights import demo


def demo_model(cache: Path, *, progress: bool = False) -> Path:
    """The folder of the demo checkpoint under `cache`, which is built on first use. Raises WeightsError."""

    def build(dense: Path, out: Path) -> None:
        from engine.upcycling import upcycle

        if progress:
            print("Building the demo model, once: calibrating routers, writing 1.4 GB", file=sys.stderr, flush=True)
        upcycle(str(dense), out, num_experts=8, noise=0.0, seed=0, progress=progress)
        # So small a model is right about capitals, but not at temperature 1.
        generation = out / "generation_config.json"
        generation.write_text(json.dumps(json.loads(generation.read_text("utf-8")) | {"do_sample": False}), "utf-8")

    return demo.checkpoint(cache, build)
