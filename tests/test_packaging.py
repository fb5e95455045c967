"""A wheel built from this tree holds everything, and runs from where it was installed."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "engine", "weights")


def pip(*arguments: str | Path, **environ: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing behind here and finds nothing of an older one; and without a
    compiler, which takes seconds instead of a minute and must work."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    arguments = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, source)
    pip(*arguments, CC="false", CXX="false")
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert held == files
    assert "weights/calibration.txt" in held


def test_wheel_names_its_licence(wheel: Path) -> None:
    fields = metadata(wheel)
    assert fields["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_what_only_tests_need_is_no_requirement(wheel: Path) -> None:
    requirements = metadata(wheel).get_all("Requires-Dist", [])
    always = {re.split(r"[^\w-]", line)[0] for line in requirements if "extra ==" not in line}
    assert "torch" in always
    assert not always & {"pytest", "transformers", "openai", "httpx", "hypothesis", "mypy", "ruff"}


@pytest.mark.parametrize("command", [[sys.executable, "-m", "server"], ["bin/mixserve"]], ids=["module", "script"])
def test_installed_command_runs(installed: Path, command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    result = subprocess.run(
        [*command, "--help"], cwd=installed, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout
    assert "plan" in result.stdout


def test_installed_packages_are_the_ones_imported(installed: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(PACKAGES)}\nprint(*(m.__file__ for m in ({', '.join(PACKAGES)})), sep='\\n')"
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, text=True
    )
    assert output.splitlines() == [str(installed / name / "__init__.py") for name in PACKAGES]


def test_every_requirement_is_pinned() -> None:
    """`make` installs exact versions: each requirement has a pin, and each pin is exact."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    required = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"] + extras}
    assert required <= set(names)
    assert "setuptools" in names


def test_dockerfile_copies_what_its_context_holds() -> None:
    """No docker engine runs in the tests: at least every file it copies exists and is not ignored."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    sources = {source for sources in copies for source in sources}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == kept == {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE", *PACKAGES}
    assert all((ROOT / source).exists() for source in sources)


def test_node_client_is_pinned_and_its_lock_file_names_no_registry() -> None:
    """Whatever registry npm is set to, what it gives must have the hash of the lock file."""
    folder = ROOT / "tests" / "e2e" / "node"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert wanted == packages.pop("")["dependencies"]
    assert {path.removeprefix("node_modules/"): entry["version"] for path, entry in packages.items()} == wanted
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in packages.values())
    assert "node_modules/" in (ROOT / ".gitignore").read_text().splitlines()


def test_ci_does_not_leave_the_node_client_out() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    required = next(number for number, line in enumerate(lines) if line.startswith("export MIXSERVE_REQUIRE_NODE=1"))
    assert required < lines.index("make check test")
