"""Host memory while a checkpoint streams to where it goes: under two shards, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny_mixtral
from tests.weights.test_config import MIXTRAL_8X7B
from weights.checkpoint import INDEX_NAME, TensorInfo
from weights.config import parse_config
from weights.families import family_of
from weights.writer import header_bytes, shard_names

ROOT = Path(__file__).parent.parent.parent
SHARD_BYTES = 4_950_000_000  # gives 19 shards of 8x7B, as its release has

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")


def probe(folder: Path, suffix: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.weights.memory_probe", str(folder), suffix]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, int] = json.loads(result.stdout)
    return report


def write_sparse_8x7b(folder: Path) -> list[int]:
    """A checkpoint with all names, shapes and sizes of 8x7B, whose data are holes: 93 GB that take no disk. Returns the
    shards' sizes.
    """
    config = parse_config(MIXTRAL_8X7B)
    infos = {}
    for piece in family_of(config).pieces(config):
        infos[piece.source] = TensorInfo(piece.shape, torch.bfloat16, 2 * torch.Size(piece.shape).numel())
    shards = shard_names(infos, SHARD_BYTES)
    sizes = []
    for file, names in shards.items():
        header = header_bytes({name: infos[name] for name in names})
        (folder / file).write_bytes(header)
        sizes.append(len(header) + sum(infos[name].nbytes for name in names))
        os.truncate(folder / file, sizes[-1])
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return sizes


def test_a_checkpoint_of_the_shape_of_8x7b(tmp_path: Path) -> None:
    sizes = write_sparse_8x7b(tmp_path)
    assert len(sizes) == 19
    report = probe(tmp_path, ".3.w2.weight")  # of 32 layers, one tensor of 117 MB each: 3.8 GB, from nearly every shard
    assert report["num_pieces"] == 995
    assert report["bytes_streamed"] == 93_405_585_408
    assert report["bytes_read"] == 32 * 4096 * 14336 * 2
    assert report["num_samples"] > 100
    assert report["anonymous"] + report["file_mapped"] < 2 * max(sizes)
    # In truth it is about one tensor: the copy that the sink makes, and the pages that it reads for it.
    assert report["anonymous"] < 1 << 30
    assert report["file_mapped"] < 2 * report["largest_tensor"]


def test_a_checkpoint_of_which_every_byte_is_read(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, shards=4, hidden_size=512, intermediate_size=2048, num_layers=4, num_experts=4)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) > 50_000_000
    report = probe(tmp_path, "")
    assert report["bytes_read"] == report["bytes_streamed"] > 3 * max(sizes)
    assert report["num_samples"] > 10
    assert report["anonymous"] + report["file_mapped"] < 2 * max(sizes)
    assert report["file_mapped"] < max(sizes)
