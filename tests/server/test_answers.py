"""The best of several answers."""

from __future__ import annotations

from server.answers import Answer, best_of


def answer(index: int, mean: float) -> Answer:
    return Answer(index=index, text=str(index), tokens=(), finish_reason="stop", mean_logprob=mean, routing={})


def test_the_likeliest_of_each_prompt_in_order() -> None:
    found = [answer(0, -3.0), answer(1, -1.0), answer(2, -2.0), answer(3, -0.1), answer(4, -5.0), answer(5, -0.1)]
    best = best_of(found, 3, 2)
    assert [(item.index, item.text) for item in best] == [(0, "1"), (1, "2"), (2, "3"), (3, "5")]


def test_all_of_them_keep_the_order_that_they_have_in_a_stream() -> None:
    found = [answer(index, float(index)) for index in range(4)]
    assert best_of(found, 2, 2) == found
