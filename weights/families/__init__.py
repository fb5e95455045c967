"""One module a model family: which parameters it has and which checkpoint tensors make them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weights.config import ModelConfig
from weights.errors import ConfigError
from weights.families import dense, mixtral
from weights.params import Piece


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` names its tensors.

    `pieces` lists every tensor a checkpoint must have, `optional` those it may have. `is_extra` tells, by name, the
    known tensors that a checkpoint may have beside them and that are left unread.
    """

    pieces: Callable[[ModelConfig], tuple[Piece, ...]]
    optional: Callable[[ModelConfig], tuple[Piece, ...]]
    is_extra: Callable[[ModelConfig, str], bool]


FAMILIES = {
    "mixtral": Family(mixtral.pieces, mixtral.optional, mixtral.is_extra),
    "llama": Family(dense.pieces, mixtral.optional, mixtral.is_extra),
    "mistral": Family(dense.pieces, mixtral.optional, mixtral.is_extra),
}


def family_of(config: ModelConfig) -> Family:
    """The family of `config.model_type`. Raises ConfigError when there is none."""
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"model_type {config.model_type!r} is not supported; known: {known}")
    return FAMILIES[config.model_type]
