"""Which files of a checkpoint folder may be opened, and how. Nothing here follows a name out of the folder."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights.errors import CheckpointError
from weights.strict_json import parse_object


def find_file(folder: Path, name: str) -> Path:
    """The path of the regular file `name` directly inside `folder`.

    It may be a link that points into the folder itself or, when the folder is a snapshot of the hub's cache
    (`models--org--name/snapshots/<commit>`), into that repository's `blobs`. Raises CheckpointError for a name with a
    directory in it, a link that leads elsewhere, and anything that is not a regular file (a FIFO, a device, a folder).
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: file name {name[:200]!r} must be a plain name inside the folder")
    home = folder.resolve()
    try:
        path = (home / name).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{folder / name}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "a loop of symbolic links"
        raise CheckpointError(f"{folder / name}: {reason}") from None
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.parent not in allowed:
        raise CheckpointError(f"{folder / name}: the link leaves the checkpoint folder (it leads to {path})")
    check_regular(path, mode)
    return folder / name


def check_regular(path: Path, mode: int) -> None:
    """Raises CheckpointError unless `mode` (of os.stat) is a regular file's."""
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")


def has_file(folder: Path, name: str) -> bool:
    """Whether `folder` has an entry `name`, be it usable or not."""
    return os.path.lexists(folder / name)


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the file. Raises CheckpointError when it is larger than `max_bytes` or malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes:,} bytes")
    try:
        return parse_object(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_new(path: Path) -> None:
    """Raises CheckpointError unless there is nothing at `path`, or an empty folder."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: is there already; name a new or empty folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed to it when the block ends well, and is removed otherwise.

    So `path` is complete whenever it is there. Raises CheckpointError when it is there already and not empty.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)  # a temporary folder is private, a checkpoint is not
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
