"""LLM over a core that plays a script, and over the real one with a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigurationError, ContextLengthError, EngineError, InvalidRequestError, RequestFailedError
from engine.grammar.vocabulary import GrammarVocabulary
from engine.llm import LLM
from engine.types import EngineInfo, FinishReason, Request, SamplingParams, Steering, TokenEvent, TokenLogprobs
from tests.engine.infos import engine_info
from tests.engine.text.checkpoints import CHATML, byte_level, sentencepiece
from tests.tiny import write_tiny_mixtral
from weights.errors import CheckpointError

VOCAB = 300
INFO = engine_info(vocab_size=VOCAB, record_routing=False)


@dataclass
class ScriptedCore:
    """Answers the n-th request with `answers[n]`, `per_step` ids a step, the newest request first.

    The last id of an answer is repeated until max_tokens, unless it is a stop id. An exception fails the request; None
    breaks the engine.
    """

    answers: Sequence[Sequence[int] | Exception | None]
    info: EngineInfo = INFO
    per_step: int = 1
    requests: list[Request] = field(default_factory=list)
    live: dict[str, list[int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """This core follows no grammar."""

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.live[request.request_id] = []

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.live.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        return [self.advance(request_id) for request_id in reversed(list(self.live))]

    def advance(self, request_id: str) -> TokenEvent:
        index, request = next((i, r) for i, r in enumerate(self.requests) if r.request_id == request_id)
        answer, params, done = self.answers[index], request.params, self.live[request_id]
        if answer is None:
            raise RuntimeError("the device is gone")
        if isinstance(answer, Exception):
            del self.live[request_id]
            return TokenEvent(request_id=request_id, finish_reason=FinishReason.ERROR, error=str(answer))
        new: list[int] = []
        reason: FinishReason | None = None
        stop_reason = None
        while reason is None and len(new) < self.per_step:
            position = len(done) + len(new)
            new.append(answer[position] if position < len(answer) else answer[-1])
            if new[-1] in params.stop_token_ids:
                reason, stop_reason = FinishReason.STOP, new[-1]
            elif position + 1 == params.max_tokens:
                reason = FinishReason.LENGTH
        first = not done
        done += new
        if reason is not None:
            del self.live[request_id]
        logprobs = tuple(TokenLogprobs(token, -0.5, 1) for token in new)
        return TokenEvent(
            request_id=request_id,
            token_ids=tuple(new),
            logprobs=logprobs if params.logprobs is not None else None,
            prompt_logprobs=(TokenLogprobs(1, -1.0, 2),) if first and params.prompt_logprobs is not None else None,
            num_cached_tokens=4,
            finish_reason=reason,
            stop_reason=stop_reason,
        )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return byte_level(tmp_path / "model", chat_template=CHATML)


def make(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *answers: str | Sequence[int] | Exception | None, **fields: Any
) -> tuple[LLM, ScriptedCore]:
    core = ScriptedCore([])
    monkeypatch.setattr(EngineCore, "build", lambda _config: core)
    llm = LLM(str(checkpoint))
    core.answers = [ids_of(llm, answer) if isinstance(answer, str) else answer for answer in answers]
    for name, value in fields.items():
        setattr(core, name, value)
    return llm, core


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special_tokens=False)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 20} | fields))


def test_completions_are_in_the_prompts_order(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, core = make(monkeypatch, checkpoint, "one<|im_end|>", "number two<|im_end|>", "3<|im_end|>")
    completions = llm.generate(["a", [7, 8], "c"], params())
    assert [completion.text for completion in completions] == ["one", "number two", "3"]
    assert [completion.prompt_ids for completion in completions] == [
        tuple(llm.tokenizer.encode("a")),
        (7, 8),
        tuple(llm.tokenizer.encode("c")),
    ]
    assert len({request.request_id for request in core.requests}) == 3
    for completion, text in zip(completions, ["one", "number two", "3"], strict=True):
        assert completion.token_ids == tuple(ids_of(llm, text + "<|im_end|>"))  # with the end of sequence
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason is None
        assert completion.num_cached_tokens == 4
        assert completion.logprobs is completion.prompt_logprobs is None


def test_params_for_each_prompt(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint, "hell", "hell")
    short, long = llm.generate(["a", "b"], [params(max_tokens=1), params(max_tokens=3, logprobs=0, prompt_logprobs=0)])
    assert (short.text, short.finish_reason, len(short.token_ids)) == ("hell", FinishReason.LENGTH, 1)
    assert long.token_ids == tuple(ids_of(llm, "hell")) * 3
    assert long.logprobs == tuple(TokenLogprobs(token, -0.5, 1) for token in long.token_ids)
    assert long.prompt_logprobs == (TokenLogprobs(1, -1.0, 2),)


@pytest.mark.parametrize("per_step", [1, 2, 50])
def test_a_stop_string_cuts_text_and_tokens_and_aborts(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, per_step: int
) -> None:
    llm, core = make(monkeypatch, checkpoint, "ab#cd and more", "abc<|im_end|>", per_step=per_step)
    stopped, other = llm.generate(["x", "y"], params(stop=("#cd",), max_tokens=14, logprobs=0))
    assert stopped.text == "ab"
    assert stopped.token_ids == tuple(ids_of(llm, "ab"))
    assert stopped.logprobs is not None
    assert len(stopped.logprobs) == 2
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, "#cd")
    assert (other.text, other.stop_reason) == ("abc", None)
    assert core.aborted == ([core.requests[0].request_id] if per_step < 14 else [])
    assert not core.has_work


def test_a_stop_string_in_the_output(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint, "ab#cd")
    (completion,) = llm.generate(["x"], params(stop=("#c",), include_stop_str_in_output=True))
    assert completion.text == "ab#c"
    assert completion.token_ids == tuple(ids_of(llm, "ab#c"))


def test_what_was_held_back_is_flushed_at_the_end(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint, "ab#c", "é")
    completions = llm.generate(["x", "y"], [params(stop=("#cd",), max_tokens=4), params(max_tokens=1)])
    assert [completion.text for completion in completions] == ["ab#c", "\ufffd"]


def test_stop_ids(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint, "ab#", "ab#")
    (stop,) = ids_of(llm, "#")
    hidden, shown = llm.generate(
        ["x", "y"],
        [params(stop_token_ids=(stop,)), params(stop_token_ids=(stop,), include_stop_str_in_output=True)],
    )
    assert (hidden.text, shown.text) == ("ab", "ab#")
    assert hidden.token_ids == shown.token_ids == tuple(ids_of(llm, "ab#"))
    assert hidden.stop_reason == shown.stop_reason == stop


def test_the_tokenizers_end_of_sequence_reaches_the_core(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, core = make(monkeypatch, checkpoint, "a<|im_end|>", "a<|im_end|>")
    (im_end,) = ids_of(llm, "<|im_end|>")
    first, second = llm.generate(["x", "y"], [params(max_tokens=3), params(max_tokens=3, ignore_eos=True)])
    assert [request.params.stop_token_ids for request in core.requests] == [(im_end,), ()]
    assert (first.finish_reason, second.finish_reason) == (FinishReason.STOP, FinishReason.LENGTH)
    assert (first.text, second.text) == ("a", "a")


def test_chat(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint, "yes<|im_end|>")
    messages = [{"role": "user", "content": "hello<|im_end|>"}]
    (completion,) = llm.chat([messages], params())
    assert completion.prompt_ids == tuple(llm.tokenizer.encode_chat(messages))
    assert completion.text == "yes"


def test_completions_keep_sentencepieces_first_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path, chat_template="{{ messages[0].content }}")
    llm, _ = make(monkeypatch, folder, "ab</s>", "ab</s>")
    assert llm.generate(["c"], params())[0].text == " ab"
    assert llm.chat([[{"role": "user", "content": "c"}]], params())[0].text == "ab"


def test_a_failed_request_is_raised_when_the_others_have_ended(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    llm, core = make(monkeypatch, checkpoint, "abc<|im_end|>", MemoryError("out of memory"), ValueError("other"))
    with pytest.raises(RequestFailedError, match=r"^prompt 1: out of memory \(and 1 more\)$"):
        llm.generate(["x", "y", "z"], params())
    assert not core.has_work
    assert core.aborted == []


def test_a_broken_engine_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, core = make(monkeypatch, checkpoint, "abc", None)
    with pytest.raises(RuntimeError, match="device is gone"):
        llm.generate(["x", "y"], params())
    assert sorted(core.aborted) == [request.request_id for request in core.requests]


def test_a_core_that_forgets_a_request(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, core = make(monkeypatch, checkpoint, "abc")
    monkeypatch.setattr(core, "add", core.requests.append)
    with pytest.raises(EngineError, match="stopped before all requests had ended"):
        llm.generate(["x"], params())


@pytest.mark.parametrize(
    ("prompts", "options", "param"),
    [
        ("one text", params(), "prompts"),
        (["good", "\ud800"], params(), "prompt"),
        (["good", [VOCAB]], params(), "prompt"),
        (["good", []], params(), "prompt"),
        (["good"], [params(), params()], "params"),
        (["good", "bad"], [params(), params(top_p=0.0)], "top_p"),
    ],
)
def test_bad_requests_are_refused_before_any_begins(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, prompts: Any, options: Any, param: str
) -> None:
    llm, core = make(monkeypatch, checkpoint)
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, options)
    assert caught.value.param == param
    assert core.requests == []


def test_bad_chats(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint)
    with pytest.raises(InvalidRequestError, match="list of lists of messages"):
        llm.chat([{"role": "user", "content": "x"}], params())  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="role must be a word"):
        llm.chat([[{"content": "x"}]], params())


def test_a_prompt_beyond_the_context(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint)
    with pytest.raises(ContextLengthError):
        llm.generate([[1] * 60], params(max_tokens=5))


def test_no_prompts(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    llm, _ = make(monkeypatch, checkpoint)
    assert llm.generate([], params()) == llm.chat([], []) == []


def test_options_reach_the_core(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    configs: list[EngineConfig] = []

    def build(config: EngineConfig) -> ScriptedCore:
        configs.append(config)
        return ScriptedCore([])

    monkeypatch.setattr(EngineCore, "build", build)
    other = byte_level(tmp_path / "other")
    llm = LLM(str(checkpoint), tokenizer=str(other), chat_template="{{ 'hi' }}", max_num_seqs=3, dtype="float32")
    expected = EngineConfig(model=str(checkpoint), max_num_seqs=3, dtype="float32", max_num_batched_tokens=2048)
    assert configs == [expected]
    assert llm.tokenizer.decode(llm.tokenizer.encode_chat([])) == "hi"
    with pytest.raises(TypeError, match="no_such_option"):
        LLM(str(checkpoint), no_such_option=1)


def test_a_tokenizer_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(EngineCore, "build", lambda _config: ScriptedCore([], replace(INFO, vocab_size=260)))
    with pytest.raises(ConfigurationError, match="the model's vocabulary has 260 tokens"):
        LLM(str(checkpoint))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(str(checkpoint), tokenizer=str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = byte_level(tmp_path_factory.mktemp("llm"), chat_template=CHATML)
    write_tiny_mixtral(folder, vocab_size=VOCAB, seed=1)
    return LLM(str(folder), device="cpu", dtype="float32", block_size=4, kv_cache_memory_bytes=1 << 20)


def test_the_real_core(real: LLM) -> None:
    prompts: list[str | list[int]] = ["hello world", [5, 6, 7]]
    together = real.generate(prompts, params(max_tokens=6, ignore_eos=True))
    for prompt, completion in zip(prompts, together, strict=True):
        assert len(completion.token_ids) == 6
        assert completion.text == real.tokenizer.decode(completion.token_ids)
        (alone,) = real.generate([prompt], params(max_tokens=6, ignore_eos=True))
        assert alone.token_ids == completion.token_ids


def test_a_stop_string_frees_the_real_cores_blocks(real: LLM) -> None:
    (whole,) = real.generate(["hello"], params(max_tokens=40, ignore_eos=True))
    stop = whole.text[8:10]
    (cut,) = real.generate(["hello"], params(max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert cut.stop_reason == stop
    stats = real.core.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks


def test_steering_and_the_record(real: LLM, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match="record_routing=True"):
        real.routing()
    folder = Path(real.info.model)
    llm = LLM(
        str(folder), device="cpu", dtype="float32", block_size=4, kv_cache_memory_bytes=1 << 20, record_routing=True
    )
    only_one = Steering(experts_per_token=1, forbidden=((0, (0, 1, 2)),))
    llm.generate([[5, 6, 7]], params(max_tokens=3, ignore_eos=True), steering=only_one)
    total = llm.routing().total
    assert total.tokens == 5
    assert total.assigned[0].tolist() == [0, 0, 0, 5]
    assert total.assigned[1].sum() == 5
    llm.chat([[{"role": "user", "content": "hi"}]], params(max_tokens=1), steering=only_one)
    assert llm.routing().total.assigned[0].tolist() == [0, 0, 0, int(llm.routing().total.tokens)]
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([[1]], params(), steering=Steering(experts_per_token=5))
    assert caught.value.param == "experts_per_token"
    scripted, core = make(monkeypatch, checkpoint, "a", "b")
    scripted.generate(["x", "y"], params(max_tokens=1), steering=only_one)
    assert [request.steering for request in core.requests] == [only_one] * 2


def test_a_real_chat(real: LLM) -> None:
    (completion,) = real.chat([[{"role": "user", "content": "hello"}]], params(max_tokens=5))
    assert completion.prompt_ids == tuple(real.tokenizer.encode_chat([{"role": "user", "content": "hello"}]))
    assert completion.text == real.tokenizer.decode(completion.token_ids)
