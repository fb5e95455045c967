"""How much memory the CPU has, for a process that may be in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import machine


def physical_memory() -> int:
    with open("/proc/meminfo") as meminfo:
        return int(next(line for line in meminfo if line.startswith("MemTotal")).split()[1]) * 1024


def test_device_memory_of_the_cpu_is_this_machines() -> None:
    assert machine.device_memory("cpu") == machine.host_memory() <= physical_memory()


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        pytest.param("", {}, None, id="no control groups"),
        pytest.param("0::/a/b", {"a/b/memory.max": "max\n", "a/memory.max": "max\n"}, None, id="v2 without a limit"),
        pytest.param("0::/", {"memory.max": "70000\n"}, 70000, id="v2 container"),
        pytest.param("0::/", {"memory/memory.limit_in_bytes": "70000\n"}, None, id="v1 file in a v2 group"),
        pytest.param("0::/a/b", {"a/b/memory.max": "max\n", "a/memory.max": "70000\n"}, 70000, id="v2 group around it"),
        pytest.param("0::/a", {"a/memory.max": "70000\n", "b/memory.max": "5\n"}, 70000, id="v2 group beside it"),
        pytest.param("0::/a:b", {"a:b/memory.max": "70000"}, 70000, id="v2 colon in a name"),
        pytest.param("4:memory:/a", {"memory/a/memory.limit_in_bytes": "70000\n"}, 70000, id="v1"),
        pytest.param("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "70000\n"}, 70000, id="v1 two controllers"),
        pytest.param("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "70000\n"}, None, id="v1 another controller"),
        pytest.param("4:memory:/docker/3f", {"memory/memory.limit_in_bytes": "70000\n"}, 70000, id="v1 container"),
        pytest.param(
            "4:memory:/", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None, id="v1 without a limit"
        ),
        pytest.param(
            "4:memory:/a\n1:cpu:/\n0::/b",
            {"memory/a/memory.limit_in_bytes": "70000\n", "b/memory.max": "90000\n"},
            70000,
            id="both versions",
        ),
    ],
)
def test_host_memory_is_what_control_groups_leave(
    groups: str, limits: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    files = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{path}": limit for path, limit in limits.items()}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert machine.host_memory(tmp_path) == (physical_memory() if expected is None else expected)


def test_host_memory_without_any_file(tmp_path: Path) -> None:
    assert machine.host_memory(tmp_path) == physical_memory()
