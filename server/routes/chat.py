"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request, Response

from engine.grammar import GrammarSpec
from engine.text import TemplateError, Tokenizer
from server import answers
from server.choices import ScoredToken
from server.errors import BadRequestError
from server.job import Job, JobSpec
from server.json_io import JsonResponse
from server.logprobs import chat_logprobs
from server.openapi import responses
from server.protocol.chat import ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChatRequest, ChunkChoice
from server.routes.json_route import JsonRoute
from server.routing import trace
from server.salt import salted
from server.service import Service
from server.stream import DONE, ChunkWriter, EventStream
from server.tools import grammar
from server.tools.formats import CallFormat, call_format
from server.tools.parser import CallParser
from server.voices import CallingVoice, PlainVoice, Utterance, Voice, finish_reason, message


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)
    written = call_format(service.config.tool_call_parser, service.tokenizer)

    @routes.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=responses(ChatCompletion, 400, 404, 415, 429, chunk=ChatChunk),
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        model = service.check_model(body.model)
        service.check_admission()
        prompt_ids = await asyncio.to_thread(_encode, service.tokenizer, body)
        calls = written if body.offered_tools else None
        spec = _spec(service, body, prompt_ids, calls, await _grammar(service, body, written))
        writer = ChatWriter(service.tokenizer, body, spec.id, model, calls)
        job = Job(service, salted(spec, request))
        request.state.usage = lambda: job.usage  # for the access log
        if body.stream:
            return EventStream(writer.stream(job), job.close)
        return JsonResponse(writer.whole(await answers.collect(job, request.receive), job))

    return routes


class ChatWriter:
    """The answer to one request, whole or in chunks."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatRequest, completion_id: str, model: str, calls: CallFormat | None
    ) -> None:
        """`calls`: how calls are written in the text; None when there are none."""
        self._tokenizer = tokenizer
        self._body = body
        self._id = completion_id
        self._model = model
        self._calls = calls
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
        """The first chunk of each choice has its role, the last its finish_reason; those between have text or calls."""
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        chunks = ChunkWriter(head, include_usage=self._body.include_usage)
        voices = [self._voice() for _ in job.choices]
        async for delta in job.deltas():
            for utterance in voices[delta.index].say(delta):
                yield chunks.choice(self._chunk(delta.index, utterance))
        if self._body.include_usage:
            yield chunks.usage(job.usage)
        yield DONE

    def _voice(self) -> Voice:
        parser = self._parser()
        return PlainVoice() if parser is None else CallingVoice(parser)

    def _parser(self) -> CallParser | None:
        if self._calls is None:
            return None
        return CallParser(self._calls, shows_special=self._body.skip_special_tokens is False)

    def _chunk(self, index: int, utterance: Utterance) -> ChunkChoice:
        told = utterance.told
        chunk: ChunkChoice = {
            "index": index,
            "delta": utterance.delta,
            "logprobs": self._logprobs(told.tokens) if told is not None and told.tokens else None,
            "finish_reason": utterance.finish_reason,
        }
        if told is not None and (told.routing or told.prompt_routing):
            chunk["routing"] = trace(prompt=told.prompt_routing, tokens=told.routing or None)
        return chunk

    def _choice(self, answer: answers.Answer) -> ChatChoice:
        parser = self._parser()
        said = message(answer.text, parser)
        choice: ChatChoice = {
            "index": answer.index,
            "message": said,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason if parser is None else finish_reason(parser, answer.finish_reason),
        }
        if answer.routing:
            choice["routing"] = answer.routing
        return choice

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, tokens, self._body.top_logprobs or 0)


def _encode(tokenizer: Tokenizer, body: ChatRequest) -> tuple[int, ...]:
    try:
        tools = [tool.to_template() for tool in body.offered_tools]
        return tuple(tokenizer.encode_chat(body.to_template(), tools))
    except TemplateError as error:
        raise BadRequestError(str(error), param="messages") from None


async def _grammar(service: Service, body: ChatRequest, written: CallFormat) -> str | None:
    """What the answer must match: the calls that are demanded, or the response_format, or it or calls."""
    answer, tools, parallel = body.grammar_spec, body.offered_tools, body.may_call_several
    if demanded := body.demanded_tools:
        source = await service.constrain(grammar.calls_only(written, demanded, parallel=parallel), param="tools")
        for tool in demanded:  # whether a call can end, which is told of a schema alone
            await service.constrain(GrammarSpec.json_schema(grammar.arguments_schema(tool)), param="tools")
        return source
    if answer is not None:
        alone = await service.constrain(answer, param=body.grammar_param)
        if not tools:
            return alone
        schema = json.loads(answer.text)
        return await service.constrain(
            grammar.answer_or_calls(written, tools, schema, parallel=parallel), param=body.grammar_param
        )
    if tools and not parallel:
        return await service.constrain(grammar.text_and_one_call(written, tools), param="tools")
    return None


def _spec(
    service: Service, body: ChatRequest, prompt_ids: tuple[int, ...], calls: CallFormat | None, source: str | None
) -> JobSpec:
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
        grammar=source,
        grammar_param="tools" if body.grammar_spec is None else body.grammar_param,
        steering=body.steering,
        trace_routing=bool(body.routing),
        trace_prompt_routing=bool(body.routing_prompt),
        chat=True,
        marks={} if calls is None else calls.marks,
    )
