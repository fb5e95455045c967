"""Decode graphs, whose captured launches are plain calls here, over the same buffers: the tokens of eager steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import startup
from engine.core import EngineCore
from engine.decode_graphs import DecodeGraphs, padded_sizes
from engine.executor import LocalExecutor
from engine.types import Request, SamplingParams, Steering, TokenEvent
from tests.engine.backends.test_cuda import cuda, prompt, requests
from tests.engine.cores import greedy, make_core, run, traces
from tests.tiny import TINY_MIXTRAL, write_tiny_mixtral

pytestmark = pytest.mark.interpreter

SIZES = [1, 2, 4, 6]


class Replays:
    """Plain calls, and which of them were made."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as a capture does
        batch = run.batch  # type: ignore[attr-defined]

        def replay() -> None:
            self.rows.append((batch.num_tokens, batch.routing.max_top_k))
            run()

        return replay


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory is NaN, so that rows of padding are, and whoever reads one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tiny_mixtral(tmp_path, seed=5)
    monkeypatch.setattr(startup, "make_backend", lambda _, config, **options: cuda(config, **options))
    return tmp_path


def make(checkpoint: Path, *, graphs: bool) -> tuple[EngineCore, Replays]:
    """A core whose decodes are replayed, and that begins every step before the last one is told; or neither."""
    built = make_core(checkpoint, backend="reference", num_blocks=22, record_routing=True, max_num_batched_tokens=16)
    replays = Replays()
    if not graphs:
        return built, replays
    executor = built._executor
    assert isinstance(executor, LocalExecutor)
    runner = executor.runner
    runner.graphs = DecodeGraphs(
        runner.model,
        runner.cache,
        runner.steering,
        runner.record,
        sizes=SIZES,
        widths=[2, 4],
        hidden_size=TINY_MIXTRAL.hidden_size,
        vocab_size=TINY_MIXTRAL.vocab_size,
        max_model_len=built.info.max_model_len,
        capture=replays,
    )
    assert int(runner.record.total().steps) == 0  # type: ignore[union-attr]
    assert not runner.cache.keys.any(), "capturing wrote into the cache"
    return EngineCore(replace(executor, runs_ahead=True), built.info), replays


def mixed_requests() -> list[Request]:
    """Those of the eager test; and drawn, penalised, scored, ended by a stop token; the steered one traced."""
    drawn = SamplingParams(max_tokens=11, seed=3, temperature=0.9, top_p=0.8, logprobs=3, ignore_eos=True)
    penalised = SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5)
    scored = SamplingParams(max_tokens=5, temperature=0.0, prompt_logprobs=2, ignore_eos=True)
    return [
        *requests(),
        Request(request_id="drawn", prompt_ids=tuple(prompt(6, 7)), params=drawn),
        Request(request_id="penalised", prompt_ids=tuple(prompt(7, 4)), params=penalised),
        Request(request_id="scored", prompt_ids=tuple(prompt(8, 5)), params=scored),
    ]


def summary(events: list[TokenEvent]) -> list[object]:
    return [
        [token for event in events for token in event.token_ids],
        [event.finish_reason for event in events if event.finish_reason],
        [entry.expert_ids for entry in traces(events)],
        [event.expert_visits for event in events],
    ]


def test_replayed_decodes_give_the_eager_tokens(checkpoint: Path) -> None:
    core, replays = make(checkpoint, graphs=True)
    eager, none = make(checkpoint, graphs=False)
    outcomes = [run(each, *mixed_requests()) for each in (core, eager)]
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, events in outcomes[0].items():
        assert summary(events) == summary(outcomes[1][name]), name
    for event, wanted in zip(outcomes[0]["drawn"], outcomes[1]["drawn"], strict=True):
        assert event.logprobs is not None
        assert wanted.logprobs is not None
        for entry, other in zip(event.logprobs, wanted.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert none.rows == []
    assert {size for size, _ in replays.rows} == set(SIZES), "with padding and without"
    assert {width for _, width in replays.rows} == {2, 4}, "steered and not"
    assert core.stats().num_preemptions > 0


def test_the_record_counts_a_padded_step_as_the_eager_one(checkpoint: Path) -> None:
    sums = []
    for graphs in (True, False):
        core, _ = make(checkpoint, graphs=graphs)
        steered = greedy("steered", prompt(1, 3), 6, Steering(experts_per_token=4, min_p=0.05))
        run(core, greedy("a", prompt(0, 4), 6), steered, greedy("b", prompt(2, 2), 6))
        sums.append(core.routing_record().total())
    for name in ("steps", "tokens", "assigned", "dispatched", "hits"):
        assert torch.equal(getattr(sums[0], name), getattr(sums[1], name)), name
    torch.testing.assert_close(sums[0].probability, sums[1].probability, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[0].entropy, sums[1].entropy, rtol=1e-5, atol=1e-5)


def test_a_smaller_batch_sees_nothing_of_a_larger_one_before(checkpoint: Path) -> None:
    """Its padding is where the other's rows were."""
    core, replays = make(checkpoint, graphs=True)
    run(core, *(greedy(str(index), prompt(index, 3), 4) for index in range(4)))
    keys = core._executor.runner.cache.keys  # type: ignore[attr-defined]
    before = keys.clone()
    replays.rows.clear()
    (events,) = run(core, greedy("one", prompt(9, 3), 6)).values()
    alone, _ = make(checkpoint, graphs=True)
    assert summary(events) == summary(run(alone, greedy("one", prompt(9, 3), 6))["one"])
    assert set(replays.rows) == {(1, 2)}
    changed = (keys != before).flatten(3).any(-1)[0].sum()
    assert changed <= 3 + 5, "one slot for each token that was computed, and none for padding"


def test_which_steps_are_replayed(checkpoint: Path) -> None:
    core, replays = make(checkpoint, graphs=True)
    run(core, *(greedy(str(index), prompt(index, 2), 3) for index in range(8)))
    assert replays.rows == [], "8 decodes are more than the largest graph"
    graphs = core._executor.runner.graphs  # type: ignore[attr-defined]
    assert graphs is not None
    core.add(greedy("prompt", prompt(0, 5), 2))
    assert not graphs.fit(core._scheduler.schedule())


def test_sizes() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(3) == [1, 2, 3]
    assert padded_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert padded_sizes(256)[-3:] == [240, 248, 256]
    assert padded_sizes(5000)[-2:] == [504, 512]
    assert len(padded_sizes(512)) == 67


def test_a_pending_token_comes_from_the_device(checkpoint: Path) -> None:
    """Steps that begin before the last one is told, without graphs."""
    eager, _ = make(checkpoint, graphs=False)
    wanted = {name: summary(events) for name, events in run(eager, *mixed_requests()).items()}
    other, _ = make(checkpoint, graphs=False)
    assert isinstance(other._executor, LocalExecutor)
    ahead = EngineCore(replace(other._executor, runs_ahead=True), other.info)
    found = {name: summary(events) for name, events in run(ahead, *mixed_requests()).items()}
    assert found == wanted
