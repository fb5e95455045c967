"""Tokens in, tokens out: the inference engine. Names are imported on first use, so that importing this costs no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.client import AsyncEngine
    from engine.config import EngineConfig
    from engine.llm import LLM, Completion
    from engine.types import (
        EngineInfo,
        EngineStats,
        FinishReason,
        Request,
        SamplingParams,
        Steering,
        TokenEvent,
        TokenLogprobs,
    )

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "Request",
    "SamplingParams",
    "Steering",
    "TokenEvent",
    "TokenLogprobs",
]

_HOME = {
    "AsyncEngine": "engine.client",
    "EngineConfig": "engine.config",
    "LLM": "engine.llm",
    "Completion": "engine.llm",
} | dict.fromkeys(
    (
        "EngineInfo",
        "EngineStats",
        "FinishReason",
        "Request",
        "SamplingParams",
        "Steering",
        "TokenEvent",
        "TokenLogprobs",
    ),
    "engine.types",
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
