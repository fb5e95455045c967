"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.json_io import JsonResponse
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

    @routes.get("/v1/models", responses={200: {"model": ModelList}})
    async def list_models() -> Response:
        models: ModelList = {"object": "list", "data": [card()]}
        return JsonResponse(models)

    @routes.get("/v1/models/{model_id:path}", responses={200: {"model": ModelCard}})
    async def retrieve_model(model_id: str) -> Response:
        service.check_model(model_id)
        return JsonResponse(card())

    return routes
