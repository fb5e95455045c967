"""LLM: prompts in, completions out, in the caller's process. The same core serves HTTP, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import ConfigurationError, EngineError, InvalidRequestError, RequestFailedError
from engine.grammar import GrammarError, GrammarSpec
from engine.text import TextStream, Tokenizer, grammar_vocabulary, stop_reason, with_eos_ids
from engine.types import FinishReason, Request, SamplingParams, Steering, TokenEvent, TokenLogprobs
from engine.validate import check_request
from weights.reader import resolve

if TYPE_CHECKING:
    from engine.routing.record import RoutingSnapshot

_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one prompt became.

    `token_ids` are the tokens of `text`, and the end-of-sequence or stop id that ended it, which is not in `text`
    (unless `include_stop_str_in_output`). A stop string cuts both where it began: the token in which it began stays if
    it wrote something before. `logprobs` is parallel to `token_ids`; `prompt_logprobs` has an entry for each prompt
    token after the first.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None
    """The stop id or stop string that ended it; None for an end-of-sequence id."""
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache."""


class LLM:
    """One loaded model for offline batches.

    `model` is a checkpoint folder, a .gguf file or a hub repository id; `tokenizer` (the same kinds) and
    `chat_template` (a template or the path of one) replace the model's own; `options` are the other fields of
    EngineConfig, with `max_num_batched_tokens` 2048 unless given. Raises WeightsError and ConfigurationError. Not for
    use from several threads.

    `core` is the engine, `info` what it says of itself, `tokenizer` the text side.
    """

    def __init__(
        self, model: str, *, tokenizer: str | None = None, chat_template: str | None = None, **options: Any
    ) -> None:
        from engine.core import EngineCore

        # Nobody waits for the next token of one answer here: steps may be as long as they are efficient.
        config = EngineConfig(model=model, **{"max_num_batched_tokens": _STEP_TOKENS, **options})
        revision = config.revision if tokenizer is None else None
        path = resolve(model if tokenizer is None else tokenizer, revision=revision)
        self.tokenizer = Tokenizer.load(path, chat_template=chat_template)
        self.core = EngineCore.build(config)
        self.info = self.core.info
        self.tokenizer.check_fits(self.info.vocab_size)
        self.core.use_vocabulary(grammar_vocabulary(self.tokenizer, self.info))
        self._num_requests = 0

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        grammar: GrammarSpec | None = None,
        steering: Steering | None = None,
    ) -> list[Completion]:
        """Continue every prompt (a text or its token ids); the completions are in the prompts' order.

        `params` are for all, or one for each; `grammar`, which every answer must match, and `steering` are for all.
        Raises InvalidRequestError for the first prompt that cannot be served, before any is begun; RequestFailedError,
        after all others have ended, when one failed inside the engine, as all do with a grammar that llguidance
        refuses: what the others became is lost with it.
        """
        if isinstance(prompts, str):
            raise InvalidRequestError("prompts must be a list of prompts, not one text", param="prompts")
        ids = [self._encode(prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
        return self._run(ids, params, grammar, steering, chat=False)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        grammar: GrammarSpec | None = None,
        steering: Steering | None = None,
    ) -> list[Completion]:
        """Answer every conversation, a list of messages {"role": …, "content": …}. Otherwise as `generate`."""
        if any(isinstance(conversation, Mapping) for conversation in conversations):
            raise InvalidRequestError(
                "conversations must be a list of lists of messages, not one list of messages", param="conversations"
            )
        ids = [self._encode_chat(messages) for messages in conversations]
        return self._run(ids, params, grammar, steering, chat=True)

    def routing(self) -> RoutingSnapshot:
        """What the routers have decided since the start, as tensors on the CPU: sums by layer and expert, and the last
        steps one by one (engine/routing/record.py). Raises ConfigurationError without `record_routing=True`."""
        if not self.info.record_routing:
            raise ConfigurationError("routing is not recorded: give LLM record_routing=True")
        return self.core.routing_record().snapshot()

    def _encode(self, prompt: str) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode(prompt))
        except ValueError as error:
            raise InvalidRequestError(str(error), param="prompt") from error

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode_chat(messages))
        except ValueError as error:
            raise InvalidRequestError(str(error), param="messages") from error

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams],
        grammar: GrammarSpec | None,
        steering: Steering | None,
        *,
        chat: bool,
    ) -> list[Completion]:
        params_list = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params_list) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts with {len(params_list)} params", param="params")
        source = None if grammar is None else _source(grammar)
        runs = []
        for prompt_ids, one in zip(prompts, params_list, strict=True):
            name = f"llm-{self._num_requests}"
            request = Request(request_id=name, prompt_ids=prompt_ids, params=one, grammar=source, steering=steering)
            self._num_requests += 1
            check_request(request, self.info)
            runs.append(_Run(request, TextStream(self.tokenizer, one, chat=chat)))
        self._finish(runs)
        errors = [f"prompt {index}: {run.error}" for index, run in enumerate(runs) if run.error is not None]
        if errors:
            raise RequestFailedError(errors[0] if len(errors) == 1 else f"{errors[0]} (and {len(errors) - 1} more)")
        return [run.completion() for run in runs]

    def _finish(self, runs: Sequence[_Run]) -> None:
        """Step the core until every run has ended. Whatever happens, none of them is left in it."""
        live = {run.request.request_id: run for run in runs}
        try:
            for run in runs:
                params = with_eos_ids(run.request.params, self.tokenizer.eos_token_ids)
                self.core.add(replace(run.request, params=params))
            while live:
                if not self.core.has_work:
                    raise EngineError("the engine stopped before all requests had ended")
                for event in self.core.step():
                    active = live.get(event.request_id)
                    if active is None:
                        continue
                    active.take(event)
                    if active.finish_reason is not None:
                        del live[event.request_id]
                        if event.finish_reason is None:
                            self.core.abort(event.request_id)
        finally:
            for request_id in live:
                self.core.abort(request_id)


def _source(grammar: GrammarSpec) -> str:
    try:
        return grammar.source()
    except GrammarError as error:
        raise InvalidRequestError(str(error), param="grammar") from None


@dataclass(slots=True)
class _Run:
    """One request on its way. It has ended when it has a finish_reason."""

    request: Request
    stream: TextStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or ()
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        delta = self.stream.push(event.token_ids, stopped=event.finish_reason is FinishReason.STOP)
        self.text += delta.text
        if delta.stop is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, delta.stop
        elif event.finish_reason is not None:
            self.text += self.stream.finish()
            self.finish_reason = event.finish_reason
            self.stop_reason = stop_reason(event, self.request.params)
            if event.finish_reason is FinishReason.ERROR:
                self.error = event.error or "failed"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        params, num_tokens = self.request.params, self.stream.num_tokens
        return Completion(
            prompt_ids=self.request.prompt_ids,
            token_ids=tuple(self.token_ids[:num_tokens]),
            text=self.text,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs[:num_tokens]) if params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
        )
