"""Job: all choices of one HTTP request, from their submission to the engine to the last delta."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from engine.errors import InvalidRequestError, RequestFailedError
from engine.text import with_eos_ids
from engine.types import Request, SamplingParams, Steering, TokenEvent
from engine.validate import check_request
from server.choices import Choice, ChoiceDelta, Echo
from server.errors import BadRequestError
from server.metrics import RequestTimer
from server.protocol.common import Usage
from server.protocol.fields import MAX_CHOICES
from server.routing import active_params_per_token, check_trace_size
from server.service import Service

_BACKLOG = 64
"""Deltas that may wait for a slow reader, all choices together; the engine's client merges what comes after."""
_LONG_TRACE = 200
"""Tokens whose trace takes some 10 ms to put into JSON's form."""


MAX_SCORED_ENTRIES = 1_000_000
"""Log probabilities of prompt tokens in one answer: some 70 MB of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What to generate: `num_choices` choices for each prompt. Choice `p * num_choices + c` is the c-th of prompt p.

    `echoes`, when not empty, has one entry a prompt.
    """

    id: str
    prompts: Sequence[tuple[int, ...]]
    params: SamplingParams
    num_choices: int
    priority: int = 0
    cache_salt: str | None = None
    grammar: str | None = None
    grammar_param: str | None = None
    """The field of the request that the grammar comes from."""
    chat: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)
    """Texts for some tokens in place of their own."""
    echoes: Sequence[Echo] = ()
    steering: Steering | None = None
    trace_routing: bool = False
    trace_prompt_routing: bool = False


@dataclass(slots=True)
class _Run:
    choice: Choice
    request_id: str
    events: AsyncIterator[TokenEvent]
    timer: RequestTimer


class Job:
    """The live choices of one HTTP request. Whoever made it must close it, which aborts what still runs."""

    def __init__(self, service: Service, spec: JobSpec) -> None:
        """Check everything, then submit everything. When one is refused, nothing stays behind.

        Raises ApiError, EngineOverloadedError and EngineDeadError.
        """
        service.check_admission()
        _check_fan_out(spec)
        requests = [_request(spec, index) for index in range(len(spec.prompts) * spec.num_choices)]
        for request in requests[:: spec.num_choices]:
            try:
                check_request(request, service.engine.info)
            except InvalidRequestError as error:
                raise _in_api_words(error, spec) from None
        check_trace_size(requests, service.engine.info)
        self._service = service
        self.spec = spec
        self._runs: list[_Run] = []
        self._open = True
        self._failed = False
        service.enter()
        try:
            for index, request in enumerate(requests):
                self._submit(index, request)
        except BaseException:
            self._failed = True
            self.close()
            raise

    def _submit(self, index: int, request: Request) -> None:
        spec = self.spec
        echo = spec.echoes[index // spec.num_choices] if spec.echoes else None
        tokenizer = self._service.tokenizer
        choice = Choice(index, tokenizer, request.params, chat=spec.chat, echo=echo, marks=spec.marks)
        params = with_eos_ids(request.params, tokenizer.eos_token_ids)
        events = self._service.engine.submit(replace(request, params=params))
        self._runs.append(_Run(choice, request.request_id, events, self._service.metrics.start_request()))

    @property
    def choices(self) -> list[Choice]:
        return [run.choice for run in self._runs]

    @property
    def usage(self) -> Usage:
        """What was read and generated so far. A prompt counts once, however many choices it has."""
        prompt_tokens = sum(len(prompt) for prompt in self.spec.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_tokens for choice in self.choices[:: self.spec.num_choices])
        usage: Usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if self.spec.steering is not None:
            visits = [choice.expert_visits for choice in self.choices if choice.expert_visits is not None]
            usage["active_params_per_token"] = active_params_per_token(
                self._service.engine.info, self.spec.steering, visits
            )
        return usage

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """What every choice brings, as it comes. Raises EngineError when one fails."""
        try:
            async with aclosing(_merge([self._run(run) for run in self._runs])) as merged:
                async for delta in merged:
                    yield delta
        except InvalidRequestError as error:
            self._failed = True
            raise _in_api_words(error, self.spec) from None
        except Exception:
            self._failed = True
            raise

    async def _run(self, run: _Run) -> AsyncGenerator[ChoiceDelta, None]:
        async for event in run.events:
            if event.queue_seconds is not None:
                run.timer.queued(event.queue_seconds)
            run.timer.tokens(len(event.token_ids))
            for delta in await _push(run.choice, event):
                if delta.finish_reason is not None:
                    self._finish(run, delta.finish_reason)
                yield delta
            if run.choice.finish_reason is not None:
                return
        raise RequestFailedError("the engine ended the request without a reason")

    def _finish(self, run: _Run, reason: str) -> None:
        # After a stop string the engine, which knows no text, would go on; after any other end this does nothing.
        self._service.engine.abort(run.request_id)
        self._service.metrics.count_success(reason)
        run.timer.finish()

    def close(self) -> None:
        """Abort what has not ended. May be called again."""
        if not self._open:
            return
        self._open = False
        self._service.leave()
        for run in self._runs:
            if run.choice.finish_reason is None:
                self._service.engine.abort(run.request_id)
                if not self._failed:
                    self._service.metrics.count_aborted()


def _check_fan_out(spec: JobSpec) -> None:
    num_top = spec.params.prompt_logprobs
    scored = 0 if num_top is None else sum(map(len, spec.prompts)) * spec.num_choices * (num_top + 1)
    if scored > MAX_SCORED_ENTRIES:
        raise BadRequestError(
            f"Scoring the prompt in every choice takes {scored} log probabilities, at most {MAX_SCORED_ENTRIES} are "
            f"given; ask for fewer choices, fewer logprobs or shorter prompts.",
            param="logprobs",
        )
    total = len(spec.prompts) * spec.num_choices
    if total > MAX_CHOICES:
        raise BadRequestError(
            f"A request may have up to {MAX_CHOICES} choices; {len(spec.prompts)} prompts times {spec.num_choices} "
            f"are {total}.",
            param="n" if spec.num_choices > 1 else "prompt",
        )


def _request(spec: JobSpec, index: int) -> Request:
    prompt, choice = divmod(index, spec.num_choices)
    return Request(
        request_id=f"{spec.id}-{index}",
        prompt_ids=spec.prompts[prompt],
        params=replace(spec.params, choice=choice),
        priority=spec.priority,
        cache_salt=spec.cache_salt,
        grammar=spec.grammar,
        steering=spec.steering,
        trace_routing=spec.trace_routing,
        trace_prompt_routing=spec.trace_prompt_routing,
    )


def _in_api_words(error: InvalidRequestError, spec: JobSpec) -> BadRequestError:
    """The engine names its own fields; clients know some of them by other names."""
    names: dict[str | None, str | None] = {
        "prompt": "messages" if spec.chat else "prompt",
        "prompt_logprobs": "logprobs",
        "grammar": spec.grammar_param,
    }
    param = names.get(error.param, error.param)
    return BadRequestError(str(error), param=param, code=error.code)


async def _push(choice: Choice, event: TokenEvent) -> list[ChoiceDelta]:
    """As `choice.push`; for the trace of a long prompt in a thread, so that nobody else waits seconds for it."""
    if len(event.prompt_routing or ()) > _LONG_TRACE:
        return await asyncio.to_thread(choice.push, event)
    return choice.push(event)


async def _merge(sources: Sequence[AsyncGenerator[ChoiceDelta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """All items of all sources, as they come. The first exception of any ends it."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for delta in source:
                yield delta
        return
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue(_BACKLOG)

    async def pump(source: AsyncGenerator[ChoiceDelta, None]) -> None:
        try:
            async for delta in source:
                await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        num_live = len(pumps)
        while num_live:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_live -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
