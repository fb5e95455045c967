"""model_type -> the function that builds its decoder."""

from __future__ import annotations

from collections.abc import Callable

from engine.backends.base import BlockBackend, LayerBackend
from engine.errors import ConfigurationError
from engine.models import mixtral
from engine.models.decoder import Decoder
from engine.routing.base import Router
from weights.config import ModelConfig

BUILDERS: dict[str, Callable[[ModelConfig, LayerBackend | BlockBackend, Router], Decoder]] = {"mixtral": mixtral.build}


def build_model(config: ModelConfig, backend: LayerBackend | BlockBackend, router: Router) -> Decoder:
    """Raises ConfigurationError for a model_type that is not served."""
    if config.model_type not in BUILDERS:
        known = ", ".join(sorted(BUILDERS))
        raise ConfigurationError(
            f"model_type {config.model_type!r} cannot be served, only: {known}"
            + (" (a dense model can be turned into a mixture: mixserve upcycle)" if config.num_experts == 1 else "")
        )
    return BUILDERS[config.model_type](config, backend, router)
