"""Host memory while a checkpoint streams to where it goes: under two shards, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.tiny import TINY_MIXTRAL
from weights.checkpoint import TensorInfo
from weights.config import ModelConfig, hf_config
from weights.families import family_of
from weights.staging import HostStaging
from weights.writer import header_bytes, shard_names

ROOT = Path(__file__).parent.parent.parent
# 1/180 of 8x7B, in its proportions.
CONFIG = replace(
    TINY_MIXTRAL,
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3584,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    num_experts=8,
    dtype="bfloat16",
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Gone, with its gigabytes of page cache, when the test is done."""
    with TemporaryDirectory() as name:
        yield Path(name)


def probe(folder: Path, sink: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.weights.memory_probe", str(folder), sink]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, int] = json.loads(result.stdout)
    return report


def write_sparse(folder: Path, config: ModelConfig, shard_bytes: int) -> list[int]:
    """A checkpoint whose data are holes, which take no disk: tensor i is zeros and, as the last 8 bytes, the integer i.
    Returns the shards' sizes.
    """
    infos = {}
    for piece in family_of(config).pieces(config):
        infos[piece.source] = TensorInfo(piece.shape, torch.bfloat16, 2 * torch.Size(piece.shape).numel())
    numbers = {name: i for i, name in enumerate(infos)}
    sizes = []
    for shard, names in shard_names(infos, shard_bytes).items():
        header = header_bytes({name: infos[name] for name in names})
        end = len(header)
        with (folder / shard).open("wb") as file:
            file.write(header)
            for name in names:
                end += infos[name].nbytes
                os.pwrite(file.fileno(), numbers[name].to_bytes(8, "little"), end - 8)
        sizes.append(end)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    return sizes


def test_a_checkpoint_of_which_every_byte_is_read(folder: Path) -> None:
    """2 GB in 4 shards."""
    sizes = write_sparse(folder, replace(CONFIG, num_layers=11), 550_000_000)
    assert len(sizes) == 4
    assert sum(sizes) > 2_000_000_000
    report = probe(folder, "read")
    assert report["num_bytes"] > 2_000_000_000
    assert report["total"] == sum(range(report["num_pieces"]))
    assert report["num_samples"] > report["num_pieces"] + 50
    assert report["anonymous"] + report["file_mapped"] < 2 * max(sizes)
    # In truth it is what reading may be ahead by. The sink's buffer was not touched before.
    assert report["anonymous"] + report["file_mapped"] < HostStaging.ahead_bytes + report["largest_tensor"] + (32 << 20)


def test_small_shards(folder: Path) -> None:
    """Reading is ahead by less, so that shards of any size stay the measure."""
    sizes = write_sparse(folder, replace(CONFIG, num_layers=1, vocab_size=8000), 60_000_000)
    assert len(sizes) == 4
    report = probe(folder, "read")
    assert report["total"] == sum(range(report["num_pieces"]))
    assert report["anonymous"] + report["file_mapped"] < 2 * max(sizes)


def test_weights_that_are_quantised_as_they_come(folder: Path) -> None:
    """No second copy of the model, in 16 bits or 8, is ever there: what stays, and what reading is ahead by."""
    sizes = write_sparse(folder, replace(CONFIG, num_layers=4), 300_000_000)
    report = probe(folder, "int8")
    kept = sum(sizes) // 2
    assert kept > 400_000_000
    assert kept < report["anonymous"] + report["file_mapped"] < kept + HostStaging.ahead_bytes + (64 << 20)
