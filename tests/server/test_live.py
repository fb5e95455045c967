"""What an event says: of routing, of the engine in every state, of rates and memory."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from engine.types import EngineStats, LayerRouting, RoutingStats
from server.live import ANSWER_SECONDS, LiveView, routing_share
from server.protocol.live import Latency
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.fake_routing import fake_routing
from tests.shape_checks import check_stream

LATENCY: Latency = {
    "seconds": 60,
    "time_to_first_token": {"count": 1, "p50": 0.1, "p90": 0.1, "p99": 0.1},
    "inter_token": None,
}


class Scene:
    """A view of a fake engine."""

    def __init__(self, *, record: bool = True, chat: bool = True) -> None:
        info = replace(fake_info(), record_routing=record)
        self.engine = FakeEngine(lambda _: [], info=info)
        self.leaving = False
        self.view = LiveView(
            self.engine, lambda: LATENCY, model_id="m", has_chat=chat, leaving=lambda: self.leaving
        )  # fmt: skip

    async def event(self) -> dict[str, Any]:
        data = (await self.view.event()).decode()
        assert data.startswith("data: ")
        assert data.endswith("\n\n")
        check_stream("/v1/experts/events", [data[6:-2]], whole=False)
        found: dict[str, Any] = json.loads(data[6:])
        return found


def with_scene(use: Callable[[Scene], Awaitable[None]], **kwargs: bool) -> None:
    async def main() -> None:
        await asyncio.wait_for(use(Scene(**kwargs)), 10)

    asyncio.run(main())


def layer(assigned: tuple[int, ...], dispatched: tuple[int, ...]) -> LayerRouting:
    return LayerRouting(
        assigned=assigned,
        dispatched=dispatched,
        dropped=sum(assigned) - sum(dispatched),
        max_over_mean=1.23456,
        coefficient_of_variation=0.5,
        entropy=1.00004,
        entropy_share=0.77777,
        auxiliary_loss=1.0,
        mean_probability=(0.25,) * len(assigned),
        effective_batch=2.0,
        distinct_experts=3.0,
    )


def test_shares_are_of_what_the_router_chose() -> None:
    idle, busy = layer((0, 0, 0), (0, 0, 0)), layer((1, 2, 4), (1, 2, 1))
    found = routing_share(RoutingStats(tokens=4, steps=2, pooled_auxiliary_loss=0, layers=(busy, idle)))
    assert found == {
        "tokens": 4,
        "steps": 2,
        "share": [[0.1429, 0.2857, 0.5714], [0, 0, 0]],
        "dropped": [[0, 0, 3], [0, 0, 0]],
        "drop_share": [0.4286, 0],
        "entropy": [1.0, 1.0],
        "entropy_share": [0.7778, 0.7778],
        "imbalance": [1.2346, 1.2346],
        "effective_batch": [2.0, 2.0],
        "distinct_experts": [3.0, 3.0],
    }


def test_a_large_model_still_makes_a_small_event() -> None:
    async def use(scene: Scene) -> None:
        info = replace(scene.engine.info, num_layers=32)
        scene.engine.info = info
        scene.engine.routed += [fake_routing(number * 7 % 5, info) for number in range(100)]
        assert len(await scene.view.event()) < 10_000

    with_scene(use)


def test_the_engine_and_its_model() -> None:
    async def use(scene: Scene) -> None:
        scene.engine.routed.append(fake_routing(3, scene.engine.info))
        event = await scene.event()
        assert abs(event["time"] - time.time()) < 5
        assert event["health"] == {"status": "ok", "message": None}
        assert event["model"] == {
            "id": "m",
            "chat": True,
            "model_type": "mixtral",
            "device": "cpu",
            "dtype": "float32",
            "backend": "fake",
            "num_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_experts_per_tok": 8,
            "total_params": 3_000_000,
            "active_params": 1_000_000,
            "expert_params": 100_000,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "router": "topk_softmax",
            "capacity_factor": None,
            "routing_simulation": None,
            "record_routing": True,
            "enable_prefix_caching": True,
        }
        assert event["engine"] == {
            "num_running": 0,
            "num_waiting": 0,
            "kv_cache_usage": 0,
            "num_preemptions": 3,
            "prefix_cache_queries": 20,
            "prefix_cache_hits": 10,
            "prefix_cache_hit_rate": 0.5,
            "recomputed_tokens": 0,
            "num_steps": 0,
            "prompt_tokens": 0,
            "generation_tokens": 0,
        }
        assert event["latency"] == LATENCY
        assert event["memory"] == {
            "weights": {"expert": 5_000_000_000, "router": 1000},
            "kv_cache": 2**30,
            "activations": 10,
            "total": 2**36,
            "peak": 12345,
        }
        assert event["routing"]["recomputed_tokens"] == 5
        assert event["routing"]["window"]["tokens"] == event["routing"]["total"]["tokens"] == 1

    with_scene(use)


class Counting(FakeEngine):
    """Its counters are a test's."""

    counted = EngineStats()

    @property
    def stats(self) -> EngineStats:
        return self.counted


def test_rates_are_those_of_the_last_seconds() -> None:
    async def main() -> None:
        engine = Counting(lambda _: [])
        now = 100.0
        view = LiveView(
            engine, lambda: LATENCY, model_id="m", has_chat=True, leaving=lambda: False, clock=lambda: now
        )  # fmt: skip

        async def throughput(prompt: int, output: int) -> Any:
            engine.counted = EngineStats(
                prompt_tokens=prompt, generation_tokens=output, num_blocks=4, num_free_blocks=3
            )
            event = json.loads((await view.event())[6:])
            assert event["engine"]["kv_cache_usage"] == 0.25
            assert event["engine"]["prefix_cache_hit_rate"] is None
            return event["throughput"]

        def rate(seconds: float, prompt: float, output: float) -> dict[str, float]:
            return {"seconds": seconds, "prompt_tokens_per_second": prompt, "output_tokens_per_second": output}

        assert await throughput(1000, 500) is None
        now += 0.1
        assert await throughput(1000, 510) is None, "too short to tell"
        now += 0.9
        assert await throughput(1020, 530) == rate(1, 20, 30)
        for _ in range(5):
            now += 1
            found = await throughput(1020, 530)
        assert found == rate(5, 0, 0)
        now += 1000  # nobody listened
        assert await throughput(9000, 9000) is None

    asyncio.run(main())


def test_without_a_record_there_is_no_routing() -> None:
    async def use(scene: Scene) -> None:
        event = await scene.event()
        assert event["routing"] is None
        assert event["model"]["record_routing"] is False
        assert event["model"]["chat"] is False
        assert event["health"]["status"] == "ok"

    with_scene(use, record=False, chat=False)


def test_a_dead_engine_is_told_with_the_last_that_is_known() -> None:
    async def use(scene: Scene) -> None:
        before = (await scene.event())["routing"]
        scene.leaving = True
        scene.engine.die("killed by SIGKILL")
        event = await scene.event()
        assert event["health"] == {"status": "dead", "message": "The engine is dead: killed by SIGKILL."}
        assert event["routing"] == before

    with_scene(use)


def test_a_silent_engine_and_a_server_that_leaves() -> None:
    async def use(scene: Scene) -> None:
        scene.engine.silent = True
        begun = time.monotonic()
        assert (await scene.event())["health"]["status"] == "silent"
        assert time.monotonic() - begun < ANSWER_SECONDS / 2, "an engine that is not well is not asked"
        scene.leaving = True
        assert (await scene.event())["health"]["status"] == "shutting_down"

    with_scene(use)


def test_a_long_step_is_not_waited_for_and_its_answer_is_not_lost() -> None:
    async def use(scene: Scene) -> None:
        scene.engine.pause()
        event = await scene.event()
        assert (event["health"]["status"], event["routing"]) == ("busy", None)
        asked = scene.engine.num_reports
        assert (await scene.event())["health"]["status"] == "busy"
        assert scene.engine.num_reports == asked, "one question at a time"
        scene.engine.resume()
        event = await scene.event()
        assert event["health"]["status"] == "ok"
        assert event["routing"] is not None
        scene.engine.pause()
        event = await scene.event()
        assert event["health"]["status"] == "busy"
        assert event["routing"] is not None, "that of before"

    with_scene(use)
