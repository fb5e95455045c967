"""EngineCore: requests in, token events out, one `step` at a time. Single threaded; knows no text."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import replace

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.executor import Executor, OutOfDeviceMemoryError, Step
from engine.grammar.errors import GrammarError
from engine.grammar.matcher import Matcher
from engine.grammar.store import GrammarStore
from engine.grammar.vocabulary import GrammarVocabulary
from engine.result import Sampled, StepResult
from engine.routing.record import RoutingRecord
from engine.routing.stats import stats, what_if
from engine.scheduler import Chunk, Scheduler, StepPlan
from engine.sequence import Sequence, Status
from engine.startup import start
from engine.types import (
    CapacityWhatIf,
    EngineInfo,
    EngineStats,
    ExpertReport,
    ExpertVisits,
    FinishReason,
    Request,
    TokenEvent,
    TokenRouting,
)

_BUILD_WAIT_SECONDS = 0.005
"""How long a step without other work waits for a grammar."""


class EngineCore:
    """Schedules live requests over an executor. Requests were checked (engine/validate.py) before they get here."""

    def __init__(self, executor: Executor, info: EngineInfo, *, seed: int = 0) -> None:
        self.info = info
        self._executor = executor
        self._seed = seed
        self._blocks = BlockManager(info.num_blocks, info.block_size, enable_prefix_caching=info.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._blocks, max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens
        )
        self._live: dict[str, Sequence] = {}
        self._grammars: GrammarStore | None = None
        self._building: dict[str, tuple[Sequence, Future[Matcher]]] = {}  # what waits for its grammar
        self._under_way: tuple[StepPlan, Step] | None = None  # begun, and its result not fetched yet
        self._num_added = 0
        self._stats = EngineStats()
        self._recomputed_at_reset = 0

    @classmethod
    def build(cls, config: EngineConfig, *, progress: bool = False) -> EngineCore:
        """Load the model that `config` names. Raises WeightsError and ConfigurationError."""
        executor, info = start(config, progress=progress)
        return cls(executor, info, seed=config.seed)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._building) or self._under_way is not None

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """Learn what the tokens stand for; before the first request with a grammar."""
        self._grammars = GrammarStore(vocabulary)

    def add(self, request: Request) -> None:
        """Queue a request. Its id must not be in use."""
        assert request.request_id not in self._live, f"request id {request.request_id} is in use"
        seed = request.params.seed if request.params.seed is not None else _derived_seed(self._seed, self._num_added)
        sequence = Sequence(request, arrival=self._num_added, seed=seed, max_model_len=self.info.max_model_len)
        self._num_added += 1
        self._live[request.request_id] = sequence
        if request.grammar is None:
            self._scheduler.add(sequence)
            return
        assert self._grammars is not None, "a grammar needs a vocabulary"
        self._building[request.request_id] = sequence, self._grammars.get(request.grammar)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks. An id that is not live (it may just have finished) is ignored."""
        sequence = self._live.pop(request_id, None)
        if sequence is not None and self._building.pop(request_id, None) is None:
            self._scheduler.finish(sequence)

    def step(self) -> list[TokenEvent]:
        """Advance every scheduled sequence once. Raises whatever breaks the executor for good.

        Where the device computes while the host goes on, the step before is still under way when this one is planned
        and its forward pass begins; its tokens are told then, and this one is sampled, all of which costs the device
        nothing as long as it is done before the forward pass is.
        """
        events = self._admit_built()
        plan = self._scheduler.schedule()
        if not plan.chunks and self._under_way is None:
            wait([future for _, future in self._building.values()], timeout=_BUILD_WAIT_SECONDS)
            return events
        try:
            step = self._begin(plan) if plan.chunks else None
            events += self._finish()
            if step is not None:
                step.sample()
                self._under_way = plan, step
        except OutOfDeviceMemoryError as error:
            events += self._finish()
            return events + self._fail(plan, f"out of memory in a step of {plan.num_tokens} tokens: {error}")
        if not self._executor.runs_ahead:
            events += self._finish()
        return events

    def stats(self) -> EngineStats:
        """A snapshot for whoever watches."""
        return replace(
            self._stats,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._building),
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_cache_queries=self._blocks.num_queries,
            prefix_cache_hits=self._blocks.num_hits,
            peak_memory_bytes=self._executor.peak_memory_bytes(),
        )

    def expert_report(self) -> ExpertReport:
        """What the routing record says. Routing must be recorded."""
        record = self.routing_record()
        info = self.info
        return ExpertReport(
            router=info.router,
            num_experts=info.num_experts,
            num_experts_per_tok=info.num_experts_per_tok,
            capacity_factor=info.capacity_factor,
            simulation=info.routing_simulation,
            window=stats(record.window()),
            total=stats(record.total()),
            recomputed_tokens=self._stats.recomputed_tokens - self._recomputed_at_reset,
        )

    def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf:
        """What `capacity_factor` (> 0) would have dropped of the traffic seen. Routing must be recorded."""
        return what_if(self.routing_record().snapshot(), capacity_factor)

    def reset_experts(self) -> ExpertReport:
        """Start the routing record anew, and return what it said until now. Routing must be recorded."""
        report = self.expert_report()
        self.routing_record().reset()
        self._recomputed_at_reset = self._stats.recomputed_tokens
        return report

    def routing_record(self) -> RoutingRecord:
        """What the routers decided. Routing must be recorded."""
        record = self._executor.routing_record()
        assert record is not None, "routing is not recorded"
        return record

    def _admit_built(self) -> list[TokenEvent]:
        """Queue the requests whose grammar is there by now; those whose grammar is none have failed."""
        events = []
        for request_id, (sequence, future) in list(self._building.items()):
            if not future.done():
                continue
            del self._building[request_id]
            if (error := future.exception()) is None:
                sequence.matcher = future.result().copy()
                self._scheduler.add(sequence)
            else:
                del self._live[request_id]
                events.append(_failure(request_id, f"the grammar was refused: {error}", param="grammar"))
        return events

    def _begin(self, plan: StepPlan) -> Step:
        """The forward pass; from then on its tokens count as computed."""
        step = self._executor.forward(plan)
        recomputed_tokens = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            recomputed_tokens += min(sequence.num_computed, max(sequence.num_ever_computed, chunk.start)) - chunk.start
            sequence.num_ever_computed = max(sequence.num_ever_computed, sequence.num_computed)
            if chunk.samples and sequence.request.params.max_tokens != 0:
                sequence.num_pending += 1  # beside one of the step before, which is told next
        self._stats = replace(self._stats, recomputed_tokens=self._stats.recomputed_tokens + recomputed_tokens)
        return step

    def _finish(self) -> list[TokenEvent]:
        """Wait for the step under way, if there is one, and tell what came of it."""
        if self._under_way is None:
            return []
        plan, step = self._under_way
        self._under_way = None
        return self._postprocess(plan, step.result())

    def _postprocess(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        prompt_tokens = generation_tokens = 0
        for index, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            if sequence.status is Status.FINISHED:
                continue  # aborted, or ended by a token that was not known when the step began
            scores = result.prompt_logprobs.get(index, [])
            # Entry i scores token i + 1. After a preemption the first ones come a second time.
            sequence.prompt_logprobs += scores[max(0, len(sequence.prompt_logprobs) - chunk.start) :]
            if index in result.expert_visits:
                sequence.num_visits += result.expert_visits[index]
                sequence.num_visited_tokens += chunk.num_tokens
            routing = result.routing.get(index, [])
            if sequence.request.trace_prompt_routing and sequence.num_output == 0:
                own = routing[: max(0, sequence.num_prompt - chunk.start)]
                sequence.prompt_routing += own[max(0, len(sequence.prompt_routing) - chunk.start) :]
            if index in result.sampled:
                if sequence.num_output == 0:
                    prompt_tokens += sequence.num_prompt
                event = self._advance(chunk, result.sampled[index], routing)
                generation_tokens += len(event.token_ids)
                events.append(event)
            elif index in result.failed:
                events.append(self._give_up_grammar(sequence, result.failed[index]))
        self._stats = replace(
            self._stats,
            num_steps=self._stats.num_steps + 1,
            prompt_tokens=self._stats.prompt_tokens + prompt_tokens,
            generation_tokens=self._stats.generation_tokens + generation_tokens,
        )
        return events

    def _advance(self, chunk: Chunk, sampled: Sampled, routing: list[TokenRouting]) -> TokenEvent:
        """Append the sampled token and finish the sequence where it ends."""
        sequence = chunk.sequence
        request, params = sequence.request, sequence.request.params
        first = sequence.num_output == 0
        token_ids: tuple[int, ...] = ()
        if params.max_tokens != 0:
            sequence.num_pending -= 1
            token_ids = (sampled.token_id,)
            sequence.token_ids.append(sampled.token_id)
            if sequence.matcher is not None and not self._ends_grammar(sequence):
                try:
                    sequence.matcher.consume(sampled.token_id)
                except GrammarError as error:
                    return self._give_up_grammar(sequence, str(error))
        visits = None
        if sequence.num_visited_tokens:
            visits = ExpertVisits(sequence.num_visits, sequence.num_visited_tokens)
        prompt_routing = tuple(sequence.prompt_routing) if first and request.trace_prompt_routing else None
        sequence.prompt_routing = []  # sent once, and large
        reason, stop_reason = self._end_of(sequence)
        if reason is not None:
            sequence.finish_reason = reason
            del self._live[sequence.request.request_id]
            self._scheduler.finish(sequence)
        return TokenEvent(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=(sampled.logprobs,) if sampled.logprobs is not None and token_ids else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and params.prompt_logprobs is not None else None,
            routing=tuple(routing[-1:]) if request.trace_routing and token_ids else None,
            prompt_routing=prompt_routing,
            expert_visits=visits,
            num_cached_tokens=sequence.num_cached,
            queue_seconds=sequence.queue_seconds if first else None,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _end_of(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Why the sequence ends with its last token, if it does. An end-of-sequence id exactly at the limit is a
        stop.
        """
        params = sequence.request.params
        last = sequence.token_ids[-1]
        if sequence.num_output > 0:
            if (last in self.info.eos_token_ids and not params.ignore_eos) or self._ends_grammar(sequence):
                return FinishReason.STOP, None
            if last in params.stop_token_ids:
                return FinishReason.STOP, last
        if len(sequence.token_ids) >= sequence.max_num_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _ends_grammar(self, sequence: Sequence) -> bool:
        """Whether the last token is the end of a text that a grammar allows: after it there is nothing to ignore."""
        if sequence.matcher is None or self._grammars is None:
            return False
        return sequence.token_ids[-1] in self._grammars.eos_token_ids

    def _give_up_grammar(self, sequence: Sequence, message: str) -> TokenEvent:
        """End one running sequence whose grammar cannot be followed further."""
        assert self._grammars is not None
        assert sequence.request.grammar is not None
        self._grammars.forget(sequence.request.grammar)
        del self._live[sequence.request.request_id]
        self._scheduler.finish(sequence)
        return _failure(sequence.request.request_id, message, param="grammar")

    def _fail(self, plan: StepPlan, message: str) -> list[TokenEvent]:
        """Give up the sequences of a step that could not be computed; all others go on."""
        events = []
        for chunk in plan.chunks:
            if chunk.sequence.status is not Status.FINISHED:
                self._blocks.retract(chunk.sequence)
                del self._live[chunk.sequence.request.request_id]
                self._scheduler.finish(chunk.sequence, failed=True)
                events.append(_failure(chunk.sequence.request.request_id, message))
        return events


def _failure(request_id: str, message: str, *, param: str | None = None) -> TokenEvent:
    return TokenEvent(request_id=request_id, finish_reason=FinishReason.ERROR, error=message, param=param)


def _derived_seed(seed: int, number: int) -> int:
    """A seed for a request that brought none: different for every request, the same when a run is repeated."""
    return (seed << 32) + number
