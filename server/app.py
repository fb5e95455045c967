"""create_app: the HTTP API over one engine."""

from __future__ import annotations

from fastapi import FastAPI

from engine.text import Tokenizer
from server import errors
from server.config import ServerConfig
from server.experts import Experts
from server.limits import BodyLimit, LastResort, RequestIds
from server.metrics import Metrics
from server.protocol.errors import ErrorBody
from server.routes import chat, completions, experts, health, metrics, models
from server.service import Engine, Service
from server.version import VERSION


def create_app(engine: Engine, tokenizer: Tokenizer, config: ServerConfig) -> FastAPI:
    """The app, with its state as `app.state.service`. It uses the engine but neither starts nor ends it."""
    counters = Metrics(config.served_model_name, lambda: engine.stats)
    service = Service(engine, tokenizer, config, counters, Experts(engine))
    app = FastAPI(title="mixserve", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    errors.install(app, service.metrics.count_rejected)
    for group in (completions, chat, models, experts, health, metrics):
        app.include_router(group.router(service), responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(LastResort)
    app.add_middleware(RequestIds)  # the last one added is the outermost
    return app
