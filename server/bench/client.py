"""A client of any OpenAI-compatible server, as far as a benchmark needs one.

It sends standard fields, and `ignore_eos` as vLLM does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from server.bench.answer import AnswerReader, Failure, Outcome, refusal
from server.bench.errors import BenchError
from server.bench.http import HttpClient, HttpError, Response
from server.bench.prompts import FIRST_ID, LAST_ID, Prompt

Endpoint = Literal["completions", "chat"]

_REQUEST_SECONDS = 3600.0
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

T = TypeVar("T")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What requests are sent to, and what is in all of them."""

    model: str
    endpoint: Endpoint
    ignore_eos: bool


class Client:
    """Asks one server. For use inside one event loop."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._base_url = base_url
        self._http = HttpClient(base_url, {"Authorization": f"Bearer {api_key}"} if api_key else {})

    def close(self) -> None:
        self._http.close()

    async def model(self, wanted: str | None) -> str:
        """The id of the model to ask: `wanted`, or the first that the server lists.

        Raises BenchError when there is no server, or when it lists models and this is none of them.
        """
        try:
            response = await self._http.request("GET", "/v1/models")
        except HttpError as error:
            raise BenchError(f"no server answers at {self._base_url}: {error}") from None
        if response.status != 200:
            if wanted is not None and response.status not in (401, 403):
                return wanted  # not every server lists its models
            raise BenchError(f"{self._base_url}/v1/models: {_words(response)}")
        models = _read(response.body, _Models)
        if models is None:
            raise BenchError(f"{self._base_url} is no OpenAI-compatible server: is the URL right?")
        ids = [model.id for model in models.data]
        if not ids and wanted is None:
            raise BenchError("the server lists no model: name one with --model")
        if wanted is not None and ids and wanted not in ids:
            raise BenchError(f"the server has no model {wanted}; it has {', '.join(ids[:10])}")
        return wanted or ids[0]

    async def num_tokens(self, model: str, text: str) -> int | None:
        """How many tokens a text is, by the server's /tokenize (mixserve's and vLLM's form, and llama.cpp's)."""
        body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False}
        read = await self._post("/tokenize", body)
        tokens = None if read is None or read.status != 200 else _read(read.body, _Tokens)
        return None if tokens is None else len(tokens.tokens)

    async def highest_id(self, model: str) -> int:
        """The highest id up to LAST_ID that /detokenize knows; LAST_ID where there is no such path."""

        async def refused(token_id: int) -> bool:
            response = await self._post("/detokenize", {"model": model, "tokens": [token_id]})
            return response is not None and response.status == 400

        if not await refused(LAST_ID):
            return LAST_ID
        known, unknown = FIRST_ID, LAST_ID
        while unknown - known > 1:
            middle = (known + unknown) // 2
            known, unknown = (known, middle) if await refused(middle) else (middle, unknown)
        return known

    async def generate(self, target: Target, prompt: Prompt) -> Outcome:
        """Send one request and read its stream to the end. Never raises for what goes wrong with it."""
        body = msgspec.json.encode(_body(target, prompt))
        reader = AnswerReader(time.perf_counter())
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                response = await self._http.request("POST", _PATHS[target.endpoint], body, reader.feed)
        except TimeoutError:
            return Failure("timeout", f"no end of the answer within {_REQUEST_SECONDS:.0f} seconds")
        except HttpError as error:
            return Failure(error.kind, str(error))
        return reader.outcome() if response.status == 200 else refusal(response.status, response.body)

    async def _post(self, path: str, body: dict[str, Any]) -> Response | None:
        try:
            return await self._http.request("POST", path, msgspec.json.encode(body))
        except HttpError:
            return None


def _body(target: Target, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {"model": target.model}
    content = prompt.content
    if target.endpoint == "completions":
        body["prompt"] = content
    else:
        body["messages"] = [{"role": "user", "content": content}] if isinstance(content, str) else content
    body |= {"max_tokens": prompt.max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if target.ignore_eos:  # sent only where it matters: a strict server refuses what it does not know
        body["ignore_eos"] = True
    return body


def _words(response: Response) -> str:
    failure = refusal(response.status, response.body)
    hint = " (--api-key, MIXSERVE_API_KEY or OPENAI_API_KEY)" if response.status in (401, 403) else ""
    return f"{failure.kind}: {failure.message}{hint}"


def _read(body: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):
        return None
