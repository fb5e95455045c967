"""GET /health, /ready and /version; HEAD too, which is what some load balancers send.

/health: is the engine there and does it answer? A supervisor that sees 503 here should restart the server.
/ready: would a request be taken now? A load balancer that sees 503 here should send its requests elsewhere.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.errors import ApiError
from server.json_io import JsonResponse
from server.openapi import responses
from server.protocol.status import Health, Readiness, Version
from server.service import Service
from server.version import VERSION


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def check_engine() -> None:
        if not service.engine.healthy:
            reason = service.engine.error or "the engine does not answer"
            raise ApiError(503, f"Not healthy: {reason}.", code="engine_dead")

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", summary="Is the engine alive?", responses=responses(Health))
    async def health() -> Response:
        check_engine()
        answer: Health = {"status": "ok"}
        return JsonResponse(answer)

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready", summary="Would a request be taken now?", responses=responses(Readiness))
    async def ready() -> Response:
        check_engine()
        service.check_admission()
        answer: Readiness = {"status": "ready"}
        return JsonResponse(answer)

    @routes.head("/version", include_in_schema=False)
    @routes.get("/version", summary="The server's version", responses=responses(Version))
    async def version() -> Response:
        answer: Version = {"version": VERSION}
        return JsonResponse(answer)

    return routes
