"""GET /health, /ready and /version.

/health: is the engine there and does it answer? A supervisor that sees 503 here should restart the server.
/ready: would a request be taken now? A load balancer that sees 503 here should send its requests elsewhere.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.errors import ApiError
from server.json_io import JsonResponse
from server.service import Service
from server.version import VERSION


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def check_engine() -> None:
        if not service.engine.healthy:
            reason = service.engine.error or "the engine does not answer"
            raise ApiError(503, f"Not healthy: {reason}.", code="engine_dead")

    @routes.get("/health")
    async def health() -> Response:
        check_engine()
        return JsonResponse({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> Response:
        check_engine()
        service.check_admission()
        return JsonResponse({"status": "ready"})

    @routes.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": VERSION})

    return routes
