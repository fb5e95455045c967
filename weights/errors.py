"""What can be wrong with a checkpoint. Every error here is the caller's to fix and prints as one line.

WeightsError
├── ConfigError        config.json is missing, malformed, or asks for something this project cannot serve
├── CheckpointError    a file of the checkpoint is missing, unsafe or corrupt; a tensor is missing, doubled, left over,
│                      of the wrong shape or of the wrong dtype
└── HubError           a repository id could not be resolved
"""

from __future__ import annotations

from collections.abc import Iterable


class WeightsError(Exception):
    """Base of all errors raised by `weights`."""


class ConfigError(WeightsError):
    """The model's configuration cannot be used; the message names the field."""


class CheckpointError(WeightsError):
    """A checkpoint's files cannot be used; the message names the file or the tensor."""


class HubError(WeightsError):
    """A repository id could not be turned into a local folder."""


def show(value: object) -> str:
    """`value` for a one-line message, cut short."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 100:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse(problem: str, found: Iterable[str]) -> None:
    """Raises CheckpointError when tensors were found: one line that counts them and names the first few."""
    names = list(found)
    if names:
        more = ", …" if len(names) > 3 else ""
        noun = "tensor" if len(names) == 1 else "tensors"
        raise CheckpointError(f"{len(names)} {noun} {problem}: {', '.join(name[:200] for name in names[:3])}{more}")
