"""Amounts of memory, read and shown. What a machine has is in test_host_memory.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import machine
from engine.errors import ConfigurationError
from engine.machine import parse_memory, show_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 85_899_345_920),
        ("141GB", 141_000_000_000),
        ("512MiB", 536_870_912),
        ("123", 123),
        ("123B", 123),
        (" 1.5 gib ", 1_610_612_736),
        ("0.1GB", 100_000_000),
        ("2KiB", 2048),
        ("3kB", 3000),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_memory(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 GiB 2", "80XB", "80G", "1e9", "nan", "1.GB", "٣GB", "1_000"])
def test_parse_memory_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory: write 80GiB, 141GB, 512MiB or a number of bytes"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["9" * 5000, f"1.{'0' * 5000}GB", "1" + "x" * 5000])
def test_parse_memory_refuses_what_nobody_means_in_a_line(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory") as raised:
        parse_memory(text)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("text", ["0", "0GB", "0.1B"])
def test_parse_memory_refuses_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="is no memory at all"):
        parse_memory(text)


@given(st.integers(1, 10**18))
def test_parse_memory_is_exact(num_bytes: int) -> None:
    assert parse_memory(str(num_bytes)) == num_bytes
    assert parse_memory(f"{num_bytes}KiB") == num_bytes * 1024


def test_device_memory_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no GPU is available"):
        machine.device_memory("cuda")
    assert machine.device_memory("auto") == machine.device_memory("cpu")
    assert machine.gpu_name() is None


@pytest.mark.parametrize(
    ("num_bytes", "shown", "at_least"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1.0 kB", "1.0 kB"),
        (93_405_585_408, "93.4 GB", "93.5 GB"),
        (93_400_000_000, "93.4 GB", "93.4 GB"),
        (536_870_912, "536.9 MB", "536.9 MB"),
        (999_960_000, "1.0 GB", "1.0 GB"),
        (999_940_000, "999.9 MB", "1.0 GB"),
        (1_234_500_000_000, "1,234.5 GB", "1,234.5 GB"),
    ],
)
def test_show_bytes(num_bytes: int, shown: str, at_least: str) -> None:
    assert show_bytes(num_bytes) == shown
    assert show_bytes(num_bytes, at_least=True) == at_least


@given(st.integers(0, 10**14))
def test_what_is_shown_as_enough_is_enough(num_bytes: int) -> None:
    shown = show_bytes(num_bytes, at_least=True).replace(",", "")
    assert num_bytes <= parse_memory(shown) if num_bytes else shown == "0 B"
