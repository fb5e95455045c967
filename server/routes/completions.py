"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request, Response

from engine.text import Tokenizer
from server import answers
from server.choices import Echo, ScoredToken
from server.job import Job, JobSpec
from server.json_io import JsonResponse
from server.logprobs import completion_logprobs
from server.openapi import responses
from server.protocol.completion import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from server.routes.json_route import JsonRoute
from server.routing import trace
from server.salt import salted
from server.service import Service
from server.stream import DONE, ChunkWriter, EventStream


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(
        "/v1/completions",
        summary="Continue a prompt",
        responses=responses(Completion, 400, 404, 415, 429, chunk=Completion),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        model = service.check_model(body.model)
        service.check_admission()
        prompts = await asyncio.to_thread(_encode, service.tokenizer, body)
        constraint = body.grammar_spec
        grammar = None if constraint is None else await service.constrain(constraint, param=body.grammar_param)
        spec = _spec(service, body, prompts, grammar)
        writer = CompletionWriter(service.tokenizer, body, spec.id, model)
        job = Job(service, salted(spec, request))
        request.state.usage = lambda: job.usage  # for the access log
        if body.stream:
            return EventStream(writer.stream(job), job.close)
        found = await answers.collect(job, request.receive)
        return JsonResponse(writer.whole(answers.best_of(found, body.num_generated, body.num_choices), job))

    return routes


class CompletionWriter:
    """The answer to one request, whole or in chunks."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest, completion_id: str, model: str) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._id = completion_id
        self._model = model
        self._created = int(time.time())

    def whole(self, found: Sequence[answers.Answer], job: Job) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(answer) for answer in found],
            "usage": job.usage,
        }

    async def stream(self, job: Job) -> AsyncGenerator[bytes, None]:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        chunks = ChunkWriter(head, include_usage=self._body.include_usage)
        async for delta in job.deltas():
            choice: CompletionChoice = {
                "index": delta.index,
                "text": delta.text,
                "logprobs": self._logprobs(delta.tokens) if delta.tokens else None,
                "finish_reason": delta.finish_reason,
            }
            if delta.routing or delta.prompt_routing:
                choice["routing"] = trace(prompt=delta.prompt_routing, tokens=delta.routing or None)
            yield chunks.choice(choice)
        if self._body.include_usage:
            yield chunks.usage(job.usage)
        yield DONE

    def _choice(self, answer: answers.Answer) -> CompletionChoice:
        choice: CompletionChoice = {
            "index": answer.index,
            "text": answer.text,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        if answer.routing:
            choice["routing"] = answer.routing
        return choice

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, tokens, self._body.logprobs)


def _encode(tokenizer: Tokenizer, body: CompletionRequest) -> list[Echo]:
    """Each prompt as ids and, where it is to be given back, as text: the client's own, or what its ids say."""
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompts.append(Echo(prompt, tuple(tokenizer.encode(prompt))))
        else:
            prompts.append(Echo(tokenizer.decode(prompt) if body.echo else "", tuple(prompt)))
    return prompts


def _spec(service: Service, body: CompletionRequest, prompts: Sequence[Echo], grammar: str | None) -> JobSpec:
    scores = body.logprobs
    if body.num_generated > body.num_choices and scores is None:
        scores = 0  # to choose the best by
    prompt_logprobs = body.logprobs if body.echo else None
    if body.token_limit == 0 and prompt_logprobs is None:
        prompt_logprobs = 0  # the engine's only reason to run a prompt and generate nothing
    params = body.to_params(
        service.config.sampling_defaults,
        max_tokens=body.token_limit,
        logprobs=scores,
        prompt_logprobs=prompt_logprobs,
    )
    return JobSpec(
        id=f"cmpl-{uuid.uuid4().hex}",
        prompts=[prompt.prompt_ids for prompt in prompts],
        params=params,
        num_choices=body.num_generated,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
        grammar=grammar,
        grammar_param=body.grammar_param,
        steering=body.steering,
        trace_routing=bool(body.routing),
        trace_prompt_routing=bool(body.routing_prompt),
        echoes=prompts if body.echo else (),
    )
