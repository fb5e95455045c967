"""POST /tokenize and /detokenize: text or messages to token ids, and back.

Neither asks the engine, so both answer while it is busy and while the server shuts down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Response

from engine.text import TemplateError, Tokenizer
from server.errors import BadRequestError
from server.json_io import JsonResponse
from server.openapi import responses
from server.protocol.chat import Message, messages_to_template
from server.protocol.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from server.routes.json_route import JsonRoute
from server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/tokenize", summary="Text or messages to token ids", responses=responses(Tokenized, 400, 404, 415))
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        return await asyncio.to_thread(_tokenize, service.tokenizer, body, service.engine.info.max_model_len)

    @routes.post("/detokenize", summary="Token ids to text", responses=responses(Detokenized, 400, 404, 415))
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return await asyncio.to_thread(_detokenize, service.tokenizer, body.tokens, service.engine.info.vocab_size)

    return routes


def _tokenize(tokenizer: Tokenizer, body: TokenizeRequest, max_model_len: int) -> Response:
    """In a thread, its JSON too: the ids of a body of 2 MiB take seconds."""
    if body.messages is None:
        ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    else:
        ids = _encode_chat(tokenizer, body.messages, body)
    answer: Tokenized = {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": [tokenizer.piece(token_id) for token_id in ids] if body.return_token_strs else None,
    }
    return JsonResponse(answer)


def _encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], body: TokenizeRequest) -> list[int]:
    try:
        return tokenizer.encode_chat(
            messages_to_template(messages),
            [tool.to_template() for tool in body.tools or ()],
            add_generation_prompt=body.add_generation_prompt is not False,
        )
    except TemplateError as error:
        raise BadRequestError(str(error), param="messages") from None


def _detokenize(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int) -> Response:
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise BadRequestError(
                f"tokens[{index}] must be a token id, an integer from 0 to {vocab_size - 1}.", param="tokens"
            )
    answer: Detokenized = {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}
    return JsonResponse(answer)
