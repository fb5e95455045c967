"""API.md: "echo + logprobs scores a prompt (first entry null), with max_tokens 0 and with 1 (lm-eval sends 1 and drops
the last entry). Such a request reads no prefix cache."
"""

from __future__ import annotations

import pytest

from tests.e2e.conformance.asking import Answer, Ask

PROMPT = "The quick brown fox jumps over the lazy dog, twice."


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_echo_and_logprobs_score_a_prompt(ask: Ask, max_tokens: int, num_top: int) -> None:
    answer = ask.complete(prompt=PROMPT, echo=True, logprobs=num_top, max_tokens=max_tokens, temperature=0)
    choice = answer.only
    assert choice.text.startswith(PROMPT)
    assert choice.tokens[: len(PROMPT)] == list(PROMPT)
    assert choice.token_logprobs[0] is None
    assert choice.top_logprobs[0] is None
    assert all(score is not None for score in choice.token_logprobs[1:])
    assert choice.text_offset[: len(PROMPT)] == list(range(len(PROMPT)))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), max_tokens)
    if max_tokens == 0:
        assert (choice.text, len(choice.tokens)) == (PROMPT, len(PROMPT))
        assert choice.finish_reason == "length"


def test_the_last_entry_that_lm_eval_drops_is_of_the_generated_token(ask: Ask) -> None:
    scored = ask.complete(prompt=PROMPT, echo=True, logprobs=1, max_tokens=0).only
    lm_eval = ask.complete(
        prompt=PROMPT, echo=True, logprobs=1, max_tokens=1, temperature=0, extra={"ignore_eos": True}
    ).only
    assert lm_eval.tokens[:-1] == scored.tokens
    assert lm_eval.token_logprobs[1:-1] == pytest.approx(scored.token_logprobs[1:], abs=1e-5)
    alone = ask.complete(prompt=PROMPT, logprobs=1, max_tokens=1, temperature=0, extra={"ignore_eos": True}).only
    assert lm_eval.tokens[-1] == alone.tokens[0]
    assert lm_eval.token_logprobs[-1] == pytest.approx(alone.token_logprobs[0], abs=1e-5)


def test_scoring_reads_no_prefix_cache(ask: Ask) -> None:
    def asked(**fields: object) -> Answer:
        salted = {"cache_salt": f"echo {ask.stream}"}
        return ask.complete(prompt=PROMPT, temperature=0, extra=salted, max_tokens=1, **fields)

    asked()
    assert asked().num_cached == 48, "three blocks of 16"
    scored = asked(echo=True, logprobs=0)
    assert scored.num_cached == 0
    assert len(scored.only.token_logprobs) == len(PROMPT) + scored.usage.completion_tokens


def test_echo_alone_gives_the_prompt_back(ask: Ask) -> None:
    answer = ask.complete(prompt=["ab", "cde"], echo=True, max_tokens=2, n=2, extra={"ignore_eos": True})
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "ab", "cd", "cd"]
    assert not answer.choices[0].has_logprobs
    assert ask.complete(prompt=[104, 105], echo=True, max_tokens=0).only.text == "hi"


def test_echo_of_a_batch_with_logprobs(ask: Ask) -> None:
    answer = ask.complete(prompt=[[97, 98, 99], [100, 101]], echo=True, logprobs=0, max_tokens=0)
    assert [choice.tokens for choice in answer.choices] == [["a", "b", "c"], ["d", "e"]]
    assert [len(choice.token_logprobs) for choice in answer.choices] == [3, 2]
    assert answer.usage.prompt_tokens == 5
