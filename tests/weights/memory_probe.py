"""Loads a checkpoint in a process of its own and prints, as JSON, how much memory that took at any moment.

    python -m tests.weights.memory_probe FOLDER SINK

SINK `read` copies every byte to a buffer and keeps nothing; `int8` is the CPU's backend, which keeps the weights in 8
bits. Two kinds of memory, as the system counts them for this process, are sampled every 2 ms and at the worst moment of
each tensor: anonymous (RssAnon) and file-mapped (RssFile).
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.select import make_backend
from weights.checkpoint import open_checkpoint
from weights.loader import WeightSink, load
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


class ReadingSink:
    """Takes the sum, as 64-bit integers, of all that comes."""

    def __init__(self, largest: int) -> None:
        self._buffer = torch.empty(largest, dtype=torch.uint8)
        self.total = 0

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        assert scale is None, piece
        own = self._buffer[: tensor.nbytes]
        own.copy_(tensor.view(-1).view(torch.uint8))
        self.total += int(own.view(torch.int64).sum())


class Sampled:
    """A sink that takes a sample when a tensor is there twice: where it was read to, and in the sink."""

    def __init__(self, sink: WeightSink, sampler: Sampler) -> None:
        self._sink = sink
        self._sampler = sampler
        self.num_pieces = 0

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        self._sink.prepare(piece, tensor, scale)
        self._sampler.sample()
        self.num_pieces += 1


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))
    }


def main() -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    reading = ReadingSink(largest)
    sink: WeightSink = reading
    if sys.argv[2] == "int8":
        cpu = torch.device("cpu")
        sink = make_backend("cpu", checkpoint.config, device=cpu, dtype=torch.bfloat16, quantization="int8")
    sampler = Sampler()
    sampler.start()
    sampled = Sampled(sink, sampler)
    report = load(checkpoint, sampled)
    sampler.stop()
    print(
        json.dumps(
            {
                "anonymous": sampler.peaks["RssAnon"],
                "file_mapped": sampler.peaks["RssFile"],
                "num_samples": sampler.num_samples,
                "num_pieces": sampled.num_pieces,
                "num_bytes": report.num_bytes,
                "total": reading.total,
                "largest_tensor": largest,
            }
        )
    )


if __name__ == "__main__":
    main()
