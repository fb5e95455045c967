"""Opening GGUF files: what the gguf package takes on trust is checked first."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from weights.errors import CheckpointError
from weights.files import check_regular

if TYPE_CHECKING:
    from gguf import GGUFReader

MAX_ENTRIES = 1 << 21
"""Of one list: the largest vocabularies and merge lists have a quarter of that."""

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def open_gguf(path: Path) -> GGUFReader:
    """The file's metadata and tensors, mapped. Raises CheckpointError when it is not there or malformed."""
    from gguf import GGUFReader

    try:
        check_regular(path, path.stat().st_mode)
        with path.open("rb") as file:
            _check_metadata(file)
        return GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path}: malformed GGUF file ({str(error)[:200]})") from None


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """The scalar and string metadata by key (arrays are left where they are: a vocabulary has 50,000 entries)."""
    return {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}


def _check_metadata(file: BinaryIO) -> None:
    """Walks over the key-value pairs. Raises ValueError when one runs past the end or a list is absurdly long.

    The package reads lists entry by entry and past the end of a file without an error, so that one wrong length would
    keep it busy for years.
    """
    size = os.fstat(file.fileno()).st_size
    magic, version, _, num_pairs = _unpack(file, "<4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a little-endian GGUF file of version 2 or 3")
    for _ in range(num_pairs):
        _skip_string(file, size)
        (kind,) = _unpack(file, "<I")
        if kind != _ARRAY:
            _skip_values(file, size, kind, 1)
            continue
        kind, count = _unpack(file, "<IQ")
        if count > MAX_ENTRIES:
            raise ValueError(f"a list of {count:,} entries")
        _skip_values(file, size, kind, count)


def _skip_values(file: BinaryIO, size: int, kind: int, count: int) -> None:
    if kind == _STRING:
        for _ in range(count):
            _skip_string(file, size)
    elif kind in _SCALAR_BYTES:
        _skip(file, size, count * _SCALAR_BYTES[kind])
    else:
        raise ValueError(f"a value of type {kind}")


def _skip_string(file: BinaryIO, size: int) -> None:
    (length,) = _unpack(file, "<Q")
    _skip(file, size, length)


def _skip(file: BinaryIO, size: int, num_bytes: int) -> None:
    if file.tell() + num_bytes > size:
        raise ValueError("metadata runs past the end of the file")
    file.seek(num_bytes, os.SEEK_CUR)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise ValueError("metadata runs past the end of the file")
    return struct.unpack(layout, data)
