"""`mixserve bench offline` on a tiny checkpoint, and what it asks of the engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import engine.llm
from engine import SamplingParams
from server.bench.offline import OfflineOptions, bench_offline
from server.cli import main
from tests.shape_checks import mismatches
from tests.shapes import Shape, natural
from tests.tiny import TINY_MIXTRAL, write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

ROW: Shape = {
    "model": str,
    "device": {"cpu", "cuda"},
    "dtype": {"float32", "float16", "bfloat16"},
    "backend": str,
    "batch": natural,
    "input_len": natural,
    "output_len": natural,
    "rounds": natural,
    **{f"{kind}_tok_s{end}": float for kind in ("prefill", "decode") for end in ("", "_min", "_max")},
    "distinct_experts": float,
    "peak_memory_bytes": natural,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_mixtral(folder, vocab_size=VOCAB_SIZE, eos_token_ids=(257,))
    write_byte_tokenizer(folder)
    return folder


def test_rows(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch", "1,3,9", "--input-len", "5", "--rounds", "2", "--dtype", "float32", "--backend", "reference"]
    assert main(["bench", "offline", str(checkpoint), *flags, "--json", str(tmp_path / "x.json")]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [*mismatches([ROW], rows)] == []
    assert [(row["batch"], row["output_len"]) for row in rows] == [(1, 64), (3, 64), (9, 32)]
    for row in rows:
        assert (row["model"], row["dtype"], row["backend"]) == (str(checkpoint), "float32", "reference")
        assert (row["input_len"], row["rounds"]) == (5, 2)
        for kind in ("prefill", "decode"):
            assert 0 < row[f"{kind}_tok_s_min"] <= row[f"{kind}_tok_s"] <= row[f"{kind}_tok_s_max"]
    one, three, nine = (row["distinct_experts"] for row in rows)
    assert one == TINY_MIXTRAL.num_experts_per_tok
    assert 2 < three < nine <= TINY_MIXTRAL.num_experts
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"mixserve B={row['batch']} prefill {row['prefill_tok_s']:.0f} tok/s decode {row['decode_tok_s']:.1f} tok/s "
        f"experts {row['distinct_experts']:.1f}"
        for row in rows
    ]


@dataclass
class Calls:
    """Each engine's options, and batch size, lengths and parameters of its runs."""

    engines: list[dict[str, Any]] = field(default_factory=list)
    runs: list[tuple[int, int, SamplingParams]] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Watches the engine, on a clock where a prompt token takes 1 s and a further output token of a batch 10 s.

    The second round of each batch is half as fast.
    """
    found = Calls()
    now = 0.0
    long_runs: Counter[int] = Counter()
    init, generate = engine.llm.LLM.__init__, engine.llm.LLM.generate

    def watched_init(self: engine.llm.LLM, model: str, **options: Any) -> None:
        found.engines.append(options)
        init(self, model, **options)

    def watched_generate(self: engine.llm.LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Any:
        nonlocal now
        completions = generate(self, prompts, params)
        assert {len(completion.token_ids) for completion in completions} == {params.max_tokens}
        assert {completion.num_cached_tokens for completion in completions} == {0}
        found.runs.append((len(prompts), len(prompts[0]), params))
        found.prompts += map(tuple, prompts)
        assert params.max_tokens is not None
        pace = 1 + long_runs[len(prompts)]
        now += pace * (sum(map(len, prompts)) + 10.0 * (params.max_tokens - 1))
        long_runs[len(prompts)] += params.max_tokens > 4  # the end of a round
        return completions

    monkeypatch.setattr(engine.llm.LLM, "__init__", watched_init)
    monkeypatch.setattr(engine.llm.LLM, "generate", watched_generate)
    monkeypatch.setattr("server.bench.offline.time.perf_counter", lambda: now)
    return found


def test_the_work_and_the_rates_are_those_of_the_peer_scripts(checkpoint: Path, tmp_path: Path, calls: Calls) -> None:
    options = OfflineOptions(
        path=checkpoint,
        name="tiny",
        batches=(2, 10),
        input_len=7,
        output_len=None,
        rounds=2,
        seed=3,
        engine={"dtype": "float32"},
    )
    bench_offline(options, json_file=tmp_path / "x.json")
    timed = [(2, 4), (2, 1), (2, 64), (2, 1), (2, 64), (10, 4), (10, 1), (10, 32), (10, 1), (10, 32)]
    counted = [(2, 64), (10, 32)]
    assert [(batch, params.max_tokens) for batch, _, params in calls.runs] == timed + counted
    assert {length for _, length, _ in calls.runs} == {7}
    assert all(params.greedy and params.ignore_eos for _, _, params in calls.runs)
    assert [options["record_routing"] for options in calls.engines] == [False, True], "nothing is recorded while timed"
    assert all(options["enable_prefix_caching"] is False for options in calls.engines)
    timed_prompts = calls.prompts[: sum(batch for batch, _ in timed)]
    assert len(set(timed_prompts)) == len(timed_prompts)
    tokens = {token for prompt in timed_prompts for token in prompt}
    assert tokens <= {*range(10, VOCAB_SIZE)}
    assert len(tokens) > 150
    small, large = json.loads((tmp_path / "x.json").read_text())
    # 14 prompt tokens in 14 s and, half as fast, 28 s; 2 * 63 output tokens in 630 and 1,260 s more
    assert [small[f"prefill_tok_s{end}"] for end in ("", "_min", "_max")] == [0.75, 0.5, 1.0]
    assert [small[f"decode_tok_s{end}"] for end in ("", "_min", "_max")] == pytest.approx([0.15, 0.1, 0.2])
    assert large["decode_tok_s_max"] == pytest.approx(10 * 31 / 310)
    assert small["model"] == "tiny"


def test_a_model_that_is_too_short_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "offline", str(checkpoint), "--input-len", "1000", "--batch", "1"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("mixserve: error: ")


def test_a_file_that_cannot_be_written_is_found_first(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "offline", str(checkpoint), "--json", "/no/such/folder/x"]) == 1
    assert capsys.readouterr().err == "mixserve: error: cannot write /no/such/folder/x\n"
