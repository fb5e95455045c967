"""How much memory a device has, and amounts of memory as people write them. Imports no torch before it is needed."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from engine.errors import ConfigurationError
from weights.errors import show

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}

_HOST_CACHE_LIMIT = 4 << 30


def parse_memory(text: str) -> int:
    """ "80GiB" -> 85899345920, "141GB" -> 141000000000, "1.5 GiB", "123" (bytes) -> a number of bytes, at least 1.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{show(text)} is not an amount of memory: write 80GiB, 141GB, 512MiB or a number of bytes")
    whole, _, fraction = match[1].partition(".")
    num_bytes: int = int(whole + fraction) * _UNITS[match[2]] // 10 ** len(fraction)
    if num_bytes < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return num_bytes


def show_bytes(num_bytes: int, *, at_least: bool = False) -> str:
    """ "93.4 GB", "512.0 MB": decimal units, as devices are sold and as checkpoints are measured.

    Rounded to the nearest, or `at_least` upwards: 93,405,585,408 is 93.4 GB, or at least 93.5 GB.
    """
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size, unit = 10**3, "kB"
    for larger in ("MB", "GB"):
        if num_bytes > (999.9 if at_least else 999.95) * size:  # 999.96 MB are 1.0 GB, not 1,000.0 MB
            size, unit = size * 1000, larger
    tenths = -(-num_bytes * 10 // size) if at_least else round(num_bytes * 10 / size)
    return f"{tenths / 10:,.1f} {unit}"


def device_memory(device: str = "auto") -> int:
    """Bytes of memory of the first GPU ("cuda", or "auto" where there is one), else `host_memory()`.

    Raises ConfigurationError when "cuda" is asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda: no GPU is available here; use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        total: int = torch.cuda.get_device_properties(0).total_memory
        return total
    return host_memory()


def gpu_name() -> str | None:
    """What the first GPU is called; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def gpu_reads_fp8() -> bool:
    """Whether the first GPU, if there is one, has float8 e4m3."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 9)


def default_host_cache(available: int) -> int:
    """Bytes of a KV cache in memory of which `available` are free: the smaller of 4 GiB and a quarter of those, for
    other programs share it.
    """
    return min(_HOST_CACHE_LIMIT, max(0, available) // 4)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of this machine's memory, or of what the control groups that this process is in leave of it.

    A container or a service manager limits a group, and with it all groups inside. Where they are mounted is told by
    convention (version 2: /sys/fs/cgroup, version 1: its folder "memory"), the way to our own by /proc/self/cgroup:
    "0::/system.slice/mixserve.service" in version 2, "4:memory:/docker/3f2a" in version 1. Inside a container that way
    may be the host's and lead nowhere, but the first folder is the container's then. `root` is where the files are.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys" / "fs" / "cgroup"
    for line in _read_text(root / "proc" / "self" / "cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers == "":
            folder, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        limits = [_read_text(folder / each / name).strip() for each in (path, *path.parents)]
        sizes += [int(limit) for limit in limits if limit.isdecimal()]  # without a limit, version 2 says "max"
    return min(sizes)


def _read_text(path: Path) -> str:
    """What is in the file; nothing when there is none that can be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
