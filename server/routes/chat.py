"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request, Response

from engine.text import TemplateError, Tokenizer
from server import answers
from server.choices import ScoredToken
from server.errors import BadRequestError
from server.job import Job, JobSpec
from server.json_io import JsonResponse
from server.logprobs import chat_logprobs
from server.protocol.chat import ChatChoice, ChatCompletion, ChatLogprobs, ChatRequest, ChunkChoice, Delta
from server.routes.json_route import JsonRoute
from server.routing import trace
from server.service import Service
from server.stream import DONE, ChunkWriter, EventStream


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/chat/completions", responses={200: {"model": ChatCompletion}})
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        model = service.check_model(body.model)
        service.check_admission()
        prompt_ids = await asyncio.to_thread(_encode, service.tokenizer, body)
        spec = _spec(service, body, prompt_ids)
        writer = ChatWriter(service.tokenizer, body, spec.id, model)
        job = Job(service, spec)
        if body.stream:
            return EventStream(writer.stream(job), job.close)
        return JsonResponse(writer.whole(await answers.collect(job, request.receive), job))

    return routes


class ChatWriter:
    """The answer to one request, whole or in chunks."""

    def __init__(self, tokenizer: Tokenizer, body: ChatRequest, completion_id: str, model: str) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._id = completion_id
        self._model = model
        self._created = int(time.time())

    def whole(self, found: Sequence[answers.Answer], job: Job) -> ChatCompletion:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(answer) for answer in found],
            "usage": job.usage,
        }

    async def stream(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The first chunk of each choice has its role, the last its finish_reason; those between have text."""
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        chunks = ChunkWriter(head, include_usage=self._body.include_usage)
        introduced: set[int] = set()
        async for delta in job.deltas():
            if delta.index not in introduced:
                introduced.add(delta.index)
                yield chunks.choice(_chunk(delta.index, {"role": "assistant", "content": ""}))
            content: Delta = {"content": delta.text} if delta.text else {}
            chunk = _chunk(delta.index, content)
            chunk["logprobs"] = self._logprobs(delta.tokens) if delta.tokens else None
            chunk["finish_reason"] = delta.finish_reason
            if delta.routing or delta.prompt_routing:
                chunk["routing"] = trace(prompt=delta.prompt_routing, tokens=delta.routing or None)
            yield chunks.choice(chunk)
        if self._body.include_usage:
            yield chunks.usage(job.usage)
        yield DONE

    def _choice(self, answer: answers.Answer) -> ChatChoice:
        choice: ChatChoice = {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        if answer.routing:
            choice["routing"] = answer.routing
        return choice

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, tokens, self._body.top_logprobs or 0)


def _chunk(index: int, delta: Delta) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _encode(tokenizer: Tokenizer, body: ChatRequest) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode_chat(body.to_template()))
    except TemplateError as error:
        raise BadRequestError(str(error), param="messages") from None


def _spec(service: Service, body: ChatRequest, prompt_ids: tuple[int, ...]) -> JobSpec:
    params = body.to_params(
        service.config.sampling_defaults,
        max_tokens=body.token_limit,
        logprobs=body.num_logprobs,
    )
    return JobSpec(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        prompts=[prompt_ids],
        params=params,
        num_choices=body.num_choices,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
        steering=body.steering,
        trace_routing=bool(body.routing),
        trace_prompt_routing=bool(body.routing_prompt),
        chat=True,
    )
