"""A core without a model: what it does is scripted, so that the process boundary can be tested in milliseconds.

The script is the JSON in `EngineConfig.model`, see Script. A request for prompt (p, ...) is answered with the token ids
p, p + 1, p + 2, … (modulo VOCAB_SIZE), one a step, up to max_tokens; a prompt that starts with BAD_PROMPT fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace

from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.grammar.vocabulary import GrammarVocabulary
from engine.types import (
    CapacityWhatIf,
    EngineInfo,
    EngineStats,
    ExpertReport,
    FinishReason,
    Request,
    RoutingStats,
    SamplingParams,
    TokenEvent,
)
from tests.engine.infos import engine_info
from weights.errors import CheckpointError

CORE = f"{__name__}:FakeCore.build"
VOCAB_SIZE = 1000
BAD_PROMPT = 666
MAX_MODEL_LEN = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Script:
    """Seconds each step sleeps, and what happens at the start or in a step (counted from 1)."""

    step_seconds: float = 0.0
    load: str = "good"
    load_seconds: float = 0.0
    raise_at: int | None = None
    exit_at: int | None = None
    kill_at: int | None = None
    sleep_at: int | None = None
    sleep_seconds: float = 60.0


def config_for(script: Script, **options: object) -> EngineConfig:
    return replace(EngineConfig(model=json.dumps(asdict(script))), **options)  # type: ignore[arg-type]


def make_request(request_id: str, first: int = 1, max_tokens: int | None = 4, num_prompt: int = 3) -> Request:
    return Request(
        request_id=request_id, prompt_ids=(first,) * num_prompt, params=SamplingParams(max_tokens=max_tokens)
    )


class FakeCore:
    """See the module. `stats().num_preemptions` counts calls of `abort`, `num_waiting` is always 0."""

    def __init__(self, script: Script, config: EngineConfig) -> None:
        self.info = make_info(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len or MAX_MODEL_LEN,
            record_routing=config.record_routing,
        )
        self._script = script
        self._live: dict[str, Request] = {}
        self._num_sent: dict[str, int] = {}
        self._num_steps = 0
        self._num_aborts = 0
        self._reset_at = 0

    @classmethod
    def build(cls, config: EngineConfig, *, progress: bool) -> FakeCore:
        script = Script(**json.loads(config.model))
        time.sleep(script.load_seconds)
        if progress:
            print("loading")
        match script.load:
            case "configuration":
                raise ConfigurationError("kv_cache_memory_bytes is\ntoo small")
            case "weights":
                raise CheckpointError("model.safetensors: header is 3 bytes long")
            case "crash":
                raise RuntimeError("device on fire")
            case "exit":
                sys.exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return cls(script, config)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """This core follows no grammar."""

    def add(self, request: Request) -> None:
        assert request.request_id not in self._live
        self._live[request.request_id] = request
        self._num_sent[request.request_id] = 0

    def abort(self, request_id: str) -> None:
        self._num_aborts += 1
        self._live.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        self._num_steps += 1
        time.sleep(self._script.step_seconds)
        if self._num_steps == self._script.raise_at:
            raise RuntimeError("step on\nfire")
        if self._num_steps == self._script.exit_at:
            os._exit(3)
        if self._num_steps == self._script.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._num_steps == self._script.sleep_at:
            time.sleep(self._script.sleep_seconds)
        return [self._advance(request) for request in list(self._live.values())]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live), num_steps=self._num_steps, num_preemptions=self._num_aborts, num_blocks=64
        )

    def expert_report(self) -> ExpertReport:
        return make_report(self._num_steps - self._reset_at)

    def capacity_what_if(self, capacity_factor: float) -> CapacityWhatIf:
        return CapacityWhatIf(
            capacity_factor=capacity_factor,
            window_steps=self._num_steps - self._reset_at,
            window_assigned=8,
            window_overflow=((1, 0),),
            total_capacity_factor=capacity_factor,
            total_assigned=16,
            total_overflow=((3, 0),),
        )

    def reset_experts(self) -> ExpertReport:
        report = self.expert_report()
        self._reset_at = self._num_steps
        return report

    def _advance(self, request: Request) -> TokenEvent:
        request_id, first = request.request_id, request.prompt_ids[0]
        if first == BAD_PROMPT:
            del self._live[request_id]
            return TokenEvent(request_id=request_id, finish_reason=FinishReason.ERROR, error="sampling failed")
        num_sent = self._num_sent[request_id]
        self._num_sent[request_id] = num_sent + 1
        last = num_sent + 1 == request.params.max_tokens
        if last:
            del self._live[request_id]
        return TokenEvent(
            request_id=request_id,
            token_ids=((first + num_sent) % VOCAB_SIZE,),
            finish_reason=FinishReason.LENGTH if last else None,
        )


def make_report(num_steps: int) -> ExpertReport:
    """A report of that many steps, without layers."""
    stats = RoutingStats(tokens=num_steps, steps=num_steps, pooled_auxiliary_loss=2.0, layers=())
    return ExpertReport(
        router="topk_softmax",
        num_experts=2,
        num_experts_per_tok=2,
        capacity_factor=None,
        simulation=None,
        window=stats,
        total=stats,
        recomputed_tokens=0,
    )


def make_info(
    *,
    max_num_seqs: int = 8,
    max_model_len: int = MAX_MODEL_LEN,
    vocab_size: int = VOCAB_SIZE,
    record_routing: bool = False,
) -> EngineInfo:
    return engine_info(
        model="fake",
        vocab_size=vocab_size,
        num_layers=1,
        num_experts=2,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        block_size=16,
        enable_prefix_caching=False,
        record_routing=record_routing,
        max_experts_per_tok=2,
        eos_token_ids=(2,),
        pid=os.getpid(),
    )
