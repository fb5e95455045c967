"""generation_config.json -> SamplingDefaults: how the checkpoint's makers want it sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.config import SamplingDefaults
from weights.errors import CheckpointError
from weights.strict_json import parse_object

log = logging.getLogger(__name__)

_FILE = "generation_config.json"
_MAX_BYTES = 2**20

_IN_RANGE: dict[str, Callable[[Any], bool]] = {
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: isinstance(value, int) and -1 <= value < 2**31,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0 < value <= 2,
}


def chosen_defaults(choice: str, checkpoint: Path) -> SamplingDefaults:
    """The defaults that `--generation-config` asks for: `auto`, `vllm` or a folder.

    The checkpoint's; OpenAI's, whatever the checkpoint says; or those of the folder, which raises CheckpointError when
    it has no generation_config.json.
    """
    if choice == "vllm":
        return SamplingDefaults()
    folder = checkpoint if choice == "auto" else Path(choice)
    if choice != "auto" and not (folder / _FILE).is_file():
        raise CheckpointError(f"{folder} has no {_FILE}")
    return sampling_defaults(folder)


def sampling_defaults(checkpoint: Path) -> SamplingDefaults:
    """The defaults of a checkpoint folder; OpenAI's where it has none (and for a file, which has none at all).

    `do_sample: false`, where a checkpoint says so, means greedy. A malformed file or value is left out, with a warning:
    a server can do without.
    """
    path = checkpoint / _FILE
    if not path.is_file():
        return SamplingDefaults()
    try:
        with path.open("rb") as file:
            values = parse_object(file.read(_MAX_BYTES))
    except (OSError, ValueError) as error:
        log.warning("%s is ignored: %s", _FILE, error)
        return SamplingDefaults()
    found: dict[str, Any] = {}
    for name, in_range in _IN_RANGE.items():
        value = values.get(name)
        if type(value) in (int, float) and in_range(value):
            found[name] = value
        elif value is not None:
            log.warning("%s: %s is out of its range and ignored", _FILE, name)
    if values.get("do_sample") is False:
        found["temperature"] = 0
    return SamplingDefaults(**found)
