"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is loaded: threads that spin while a server under test needs their core make everything ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub but the loopback one it starts itself


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model where the server keeps it, built on first use (a download of 93 MB and half a minute)."""
    from engine.demo import demo_model
    from server.cli import cache_dir

    return demo_model(cache_dir(os.environ), progress=False)
