"""Streams a checkpoint in a process of its own and prints, as JSON, how much memory that took at any moment.

    python -m tests.weights.memory_probe FOLDER SUFFIX

The sink copies every byte of the tensors whose name ends in SUFFIX (of all, when it is empty) to a buffer and touches
no other. Two kinds of memory, as the system counts them for this process, are sampled every 2 ms and at the worst
moment of each tensor: anonymous (RssAnon) and file-mapped (RssFile).
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from weights.checkpoint import open_checkpoint
from weights.loader import load
from weights.params import Piece


class Sampler(threading.Thread):
    """Highest values above those at the start, in bytes, of the memory that /proc/self/status reports."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._first = _memory()
        self.peaks = dict.fromkeys(self._first, 0)
        self.num_samples = 0
        self._done = threading.Event()

    def sample(self) -> None:
        for name, value in _memory().items():
            self.peaks[name] = max(self.peaks[name], value - self._first[name])
        self.num_samples += 1

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.sample()

    def stop(self) -> None:
        self._done.set()
        self.join()


class SampleSink:
    def __init__(self, suffix: str, largest: int, sampler: Sampler) -> None:
        self._suffix = suffix
        self._buffer = torch.empty(largest, dtype=torch.uint8)
        self._sampler = sampler
        self.num_pieces = 0
        self.num_bytes = 0

    def prepare(self, piece: Piece, tensor: Tensor) -> None:
        self.num_pieces += 1
        if piece.source.endswith(self._suffix):
            self._buffer[: tensor.nbytes] = tensor.view(-1).view(torch.uint8)
            self.num_bytes += tensor.nbytes
            self._sampler.sample()  # now all of its pages are there, and the copy


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))
    }


def main() -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    sampler = Sampler()
    sampler.start()
    sink = SampleSink(sys.argv[2], largest, sampler)
    report = load(checkpoint, sink)
    sampler.stop()
    print(
        json.dumps(
            {
                "anonymous": sampler.peaks["RssAnon"],
                "file_mapped": sampler.peaks["RssFile"],
                "num_samples": sampler.num_samples,
                "num_pieces": sink.num_pieces,
                "bytes_read": sink.num_bytes,
                "bytes_streamed": report.num_bytes,
                "largest_tensor": largest,
            }
        )
    )


if __name__ == "__main__":
    main()
