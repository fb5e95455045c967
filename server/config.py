"""ServerConfig: every option of the HTTP side, fixed at construction."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request gets for the sampling parameters it leaves out: the checkpoint's own wishes, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of one server."""

    served_model_name: str
    """The id clients ask for; any other is answered 404."""
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    max_body_bytes: int = 2 * 2**20
    shutdown_timeout: float = 60.0
    """Seconds that running requests may take to finish after the first signal."""
    death_grace: float = 2.0
    """Seconds from the engine's death to the server's exit: time to answer whoever waits and to be seen unhealthy."""
