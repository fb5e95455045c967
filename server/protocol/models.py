"""GET /v1/models."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    routing_simulation: NotRequired[str]
    """What routes in the router's place, for load tests: the model's answers mean nothing then."""


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]
