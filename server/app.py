"""create_app: the HTTP API over one engine."""

from __future__ import annotations

from fastapi import FastAPI

from engine.grammar.checker import GrammarChecker
from engine.text import Tokenizer, grammar_vocabulary
from server import errors, openapi
from server.config import ServerConfig
from server.edge.stack import middleware
from server.experts import Experts
from server.feed import Feed
from server.live import LiveView
from server.metrics import Metrics
from server.routes import chat, completions, docs, experts, health, metrics, models, page, tokenize
from server.service import Engine, Service
from server.version import VERSION


def create_app(engine: Engine, tokenizer: Tokenizer, config: ServerConfig) -> FastAPI:
    """The app, with its state as `app.state.service`. It uses the engine but neither starts nor ends it."""
    counters = Metrics(config.served_model_name, lambda: engine.stats)
    vocabulary = grammar_vocabulary(tokenizer, engine.info)
    engine.use_vocabulary(vocabulary)
    grammars = GrammarChecker(vocabulary, max_model_len=engine.info.max_model_len)
    view = LiveView(
        engine,
        counters.latency,
        model_id=config.served_model_name,
        has_chat=tokenizer.has_chat_template,
        leaving=lambda: service.draining,
    )
    service = Service(engine, tokenizer, config, counters, Experts(engine), grammars, Feed(view.event))
    app = FastAPI(
        title="mixserve",
        version=VERSION,
        openapi_url=None,
        redirect_slashes=False,
        middleware=middleware(config.edge, counters.count_rejected),
    )
    app.state.service = service
    errors.install(app, service.metrics.count_rejected)
    for group in (completions, chat, tokenize, models, experts, health, metrics):
        app.include_router(group.router(service), responses=openapi.EVERYWHERE)
    app.include_router(page.router())
    app.include_router(docs.router(lambda: openapi.document(app, config, engine.info)))
    return app
