"""The demo model, for whoever starts without a model: built on first use, found without torch afterwards."""

from __future__ import annotations

from pathlib import Path

from weights import demo


def demo_model(cache: Path, *, progress: bool = False) -> Path:
    """The folder of the demo checkpoint under `cache`, which is built on first use. Raises WeightsError."""

    def build(dense: Path, out: Path) -> None:
        from engine.upcycling import upcycle

        upcycle(str(dense), out, num_experts=8, noise=0.0, seed=0, progress=progress)

    return demo.checkpoint(cache, build)
