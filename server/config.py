"""ServerConfig: every option of the HTTP side, fixed at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.edge.keys import ApiKey

ToolCallParser = Literal["auto", "mistral", "hermes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request gets for the sampling parameters it leaves out: the checkpoint's own wishes, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """Who may come in, how much and how fast. Known before there is a model."""

    api_keys: tuple[ApiKey, ...] = ()
    """None: open to all."""
    max_concurrent_per_key: int | None = None
    """Requests that may generate at once for one key; without keys, for all clients together."""
    root_path: str = ""
    """The prefix under which a proxy serves the API."""
    allowed_origins: tuple[str, ...] = ()
    """Whose pages may call the API from a browser; `*` for all."""
    max_body_bytes: int = 2 * 2**20
    body_seconds: float = 30.0
    """For a whole body to arrive."""
    max_header_bytes: int = 32 * 2**10
    """Of a request's target, headers and trailers together."""
    header_seconds: float = 30.0
    """For them to arrive, from the first byte; and for that byte, on a connection without requests."""
    read_seconds: float = 60.0
    """How long a client may leave an answer unread, once the buffers between are full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of one server."""

    served_model_name: str
    """The id clients ask for; any other is answered 404."""
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    tool_call_parser: ToolCallParser = "auto"
    """The format of calls in answers; auto: the one that the chat template was written for."""
    shutdown_timeout: float = 60.0
    """Seconds that running requests may take to finish after the first signal."""
    death_grace: float = 2.0
    """Seconds from the engine's death to the server's exit: time to answer whoever waits and to be seen unhealthy."""
