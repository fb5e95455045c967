"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from server.json_io import JsonResponse
from server.openapi import responses
from server.protocol.fields import MODEL_ID
from server.protocol.models import ModelCard, ModelList
from server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def card() -> ModelCard:
        info = service.engine.info
        found: ModelCard = {
            "id": service.config.served_model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "mixserve",
            "max_model_len": info.max_model_len,
        }
        if info.routing_simulation is not None:
            found["routing_simulation"] = info.routing_simulation
        return found

    @routes.get("/v1/models", summary="The served model, in a list", responses=responses(ModelList))
    async def list_models() -> Response:
        models: ModelList = {"object": "list", "data": [card()]}
        return JsonResponse(models)

    @routes.get("/v1/models/{model_id:path}", summary="The served model", responses=responses(ModelCard, 404))
    async def retrieve_model(model_id: Annotated[str, Path(title=MODEL_ID)]) -> Response:
        service.check_model(model_id)
        return JsonResponse(card())

    return routes
