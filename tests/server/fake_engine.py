"""An engine that says what a test wants, one token a step, with everything the server asks of a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import EngineDeadError, EngineOverloadedError, InvalidRequestError, RequestFailedError
from engine.grammar.vocabulary import GrammarVocabulary
from engine.types import (
    CapacityWhatIf,
    EngineInfo,
    EngineStats,
    ExpertReport,
    ExpertVisits,
    FinishReason,
    MemoryUse,
    Request,
    TokenEvent,
    TokenLogprobs,
    TokenRouting,
)
from engine.validate import check_request
from tests.server.fake_routing import fake_report, fake_routing, fake_what_if, top_k_of

VOCAB_SIZE = 32000
EOS = 2

Script = Callable[[Request], Sequence[int]]


def fake_info(*, max_model_len: int = 256, max_num_seqs: int = 8, num_blocks: int = 1000) -> EngineInfo:
    return EngineInfo(
        model="fake",
        model_type="mixtral",
        device="cpu",
        dtype="float32",
        backend="fake",
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=128,
        block_size=16,
        num_blocks=num_blocks,
        enable_prefix_caching=True,
        router="topk_softmax",
        capacity_factor=None,
        routing_simulation=None,
        record_routing=True,
        max_experts_per_tok=8,
        expert_params=100_000,
        eos_token_ids=(EOS,),
        total_params=3_000_000,
        active_params=1_000_000,
        load_seconds=2.0,
        load_bytes=6_000_000_000,
        memory=MemoryUse(
            weights={"expert": 5_000_000_000, "router": 1000}, kv_cache=2**30, activations=10, total=2**36
        ),
        pid=1,
    )


@dataclass(eq=False)
class _Live:
    request: Request
    tokens: list[int]
    events: asyncio.Queue[TokenEvent | Exception] = field(default_factory=asyncio.Queue)
    num_output: int = 0
    num_rows: int = 0


class FakeEngine:
    """Runs up to `info.max_num_seqs` requests at once, each with a token a step from `script(request)`, then the end of
    sequence; a request over `max_waiting` in the queue is refused.

    `step_seconds` paces it; `pause` stops it, answers about routing too; `fail_at` makes every request fail instead of
    its token of that number. Made inside an event loop and used there.
    """

    def __init__(
        self,
        script: Script,
        *,
        info: EngineInfo | None = None,
        step_seconds: float = 0.0,
        max_waiting: int = 100,
        fail_at: int | None = None,
        num_cached_tokens: int = 0,
    ) -> None:
        self.info = info or fake_info()
        self.error: str | None = None
        self.script = script
        self.step_seconds = step_seconds
        self.max_waiting = max_waiting
        self.fail_at = fail_at
        self.failure: Exception = RequestFailedError("secret detail of the inside")
        self.num_cached_tokens = num_cached_tokens
        self.silent = False
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.routed: list[TokenRouting] = []
        self.num_reports = 0
        """How often the routing was asked for."""
        self._running: list[_Live] = []
        self._waiting: list[_Live] = []
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._dead = asyncio.Event()
        self._prompt_tokens = self._generation_tokens = 0
        self._stepping: asyncio.Task[None] | None = None

    @property
    def stats(self) -> EngineStats:
        used = sum(
            -(-(len(live.request.prompt_ids) + live.num_output) // self.info.block_size) for live in self._running
        )
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self.info.num_blocks,
            num_free_blocks=self.info.num_blocks - used,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_preemptions=3,
            prefix_cache_queries=20,
            prefix_cache_hits=10,
            peak_memory_bytes=12345,
        )

    @property
    def healthy(self) -> bool:
        return self.error is None and not self.silent

    def pause(self) -> None:
        self._resumed.clear()

    def resume(self) -> None:
        self._resumed.set()

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        self.vocabulary = vocabulary

    def submit(self, request: Request) -> AsyncIterator[TokenEvent]:
        if self.error is not None:
            raise EngineDeadError(self.error)
        check_request(request, self.info)
        if len(self._waiting) >= self.max_waiting:
            raise EngineOverloadedError("too many requests wait", retry_after=3)
        live = _Live(request, list(self.script(request)))
        assert request.request_id not in {other.request_id for other in self.requests}
        self.requests.append(request)
        self._waiting.append(live)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._run())
        return _events(live)

    def abort(self, request_id: str) -> None:
        for group in (self._running, self._waiting):
            for live in list(group):
                if live.request.request_id == request_id:
                    group.remove(live)
                    self.aborted.append(request_id)
                    live.events.put_nowait(TokenEvent(request_id=request_id, finish_reason=FinishReason.ABORT))

    async def expert_report(self) -> ExpertReport:
        self.num_reports += 1
        await self._answer()
        return fake_report(self.routed, self.info)

    async def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf:
        await self._answer()
        return fake_what_if(capacity_factor, self.info)

    async def reset_experts(self) -> ExpertReport:
        await self._answer()
        report = fake_report(self.routed, self.info)
        self.routed.clear()
        return report

    async def _answer(self) -> None:
        if self.error is not None:
            raise EngineDeadError(self.error)
        if not self.info.record_routing:
            raise InvalidRequestError("this server does not record routing (--no-record-routing)")
        await self._resumed.wait()

    def die(self, reason: str) -> None:
        self.error = reason
        for live in self._running + self._waiting:
            live.events.put_nowait(EngineDeadError(reason))
        self._running, self._waiting = [], []
        self._dead.set()

    async def wait_dead(self) -> str:
        await self._dead.wait()
        return self.error or "shut down"

    async def shutdown(self) -> None:
        if not self._dead.is_set():
            self.die("the engine was shut down")

    async def _run(self) -> None:
        while self._running or self._waiting:
            await asyncio.sleep(self.step_seconds)
            await self._resumed.wait()
            while self._waiting and len(self._running) < self.info.max_num_seqs:
                self._running.append(self._waiting.pop(0))
            for live in list(self._running):
                self._step(live)

    def _step(self, live: _Live) -> None:
        request, params = live.request, live.request.params
        if live.num_output == self.fail_at:
            self._running.remove(live)
            live.events.put_nowait(self.failure)
            return
        prompt_logprobs = prompt_routing = routing = None
        top_k = top_k_of(request, self.info)
        rows: list[TokenRouting] = []
        if live.num_output == 0:
            rows = [fake_routing(token, self.info, top_k) for token in request.prompt_ids]
            prompt_routing = tuple(rows) if request.trace_prompt_routing else None
            self._prompt_tokens += len(request.prompt_ids)
            if params.prompt_logprobs is not None:
                prompt_logprobs = tuple(score(token, params.prompt_logprobs) for token in request.prompt_ids[1:])
        token_ids: tuple[int, ...] = ()
        if params.max_tokens != 0:
            token_ids = (live.tokens[live.num_output] if live.num_output < len(live.tokens) else EOS,)
        if request.trace_routing:
            routing = tuple(fake_routing(token, self.info, top_k) for token in token_ids)
        rows += [fake_routing(token, self.info, top_k) for token in token_ids]
        self.routed += rows
        live.num_rows += len(rows)
        live.num_output += len(token_ids)
        self._generation_tokens += len(token_ids)
        event = TokenEvent(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=None if params.logprobs is None else tuple(score(token, params.logprobs) for token in token_ids),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            routing=routing,
            prompt_routing=prompt_routing,
            expert_visits=self._visits(live, top_k),
            finish_reason=self._end(live, token_ids),
            stop_reason=next((token for token in token_ids if token in params.stop_token_ids), None),
        )
        if event.finish_reason is not None:
            self._running.remove(live)
        live.events.put_nowait(event)

    def _visits(self, live: _Live, top_k: int) -> ExpertVisits | None:
        if live.request.steering is None or not self.info.record_routing:
            return None
        return ExpertVisits(live.num_rows * top_k * self.info.num_layers, live.num_rows)

    def _end(self, live: _Live, token_ids: tuple[int, ...]) -> FinishReason | None:
        params = live.request.params
        for token in token_ids:
            if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
                return FinishReason.STOP
        total = len(live.request.prompt_ids) + live.num_output
        if live.num_output == params.max_tokens or total == self.info.max_model_len:
            return FinishReason.LENGTH
        return None


def score(token: int, num_top: int) -> TokenLogprobs:
    """A made-up log probability that depends on the token alone; the next ids stand for the likeliest others."""
    logprob = fake_logprob(token)
    others = [((token + n) % VOCAB_SIZE, logprob - n) for n in range(1, num_top)]
    top = ((token, logprob), *others)[:num_top]
    return TokenLogprobs(token, logprob, 1, top)


def fake_logprob(token: int) -> float:
    return -(token % 16) / 16


async def _events(live: _Live) -> AsyncIterator[TokenEvent]:
    while True:
        event = await live.events.get()
        if isinstance(event, Exception):
            raise event
        yield event
        if event.finish_reason is not None:
            return
