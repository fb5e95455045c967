"""`mixserve bench serve` as a command, against a server whose every delay is known."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from tests.e2e.running import free_port
from tests.server.bench.stub import Behaviour, Reply, Stub, stub_server
from tests.shape_checks import mismatches
from tests.shapes import Shape, natural
from tests.tiny_tokenizer import write_byte_tokenizer

RUN: Shape = {
    "max_concurrency": (int, None),
    "request_rate": (float, None),
    "duration": float,
    "completed": natural,
    "failed": natural,
    "total_input_tokens": natural,
    "total_output_tokens": natural,
    "cached_input_tokens": natural,
    "output_tokens_counted_by": {"server", "chunks"},
    "request_throughput": float,
    "request_goodput": (float, None),
    "input_throughput": float,
    "output_throughput": float,
    "total_token_throughput": float,
    **{
        f"{name}_{metric}_ms": (float, None)
        for metric in ("ttft", "tpot", "itl", "e2el")
        for name in ("mean", "median", "p90", "p99")
    },
    "errors": {str: {"count": natural, "message": str}},
    "client_cpu_seconds": float,
    "peak_memory_bytes": (natural, None),
}
RESULT: Shape = {
    "date": str,
    "base_url": str,
    "model_id": str,
    "endpoint": {"completions", "chat"},
    "dataset": str,
    "input_len": natural,
    "output_len": natural,
    "range_ratio": float,
    "prefix_len": natural,
    "num_prefixes": natural,
    "ignore_eos": bool,
    "seed": natural,
    "goodput": {str: float},
    "runs": [RUN],
    "memory": [[float]],
}


def bench(stub: Stub, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", stub.url, *flags])


def results(file: Path) -> Any:
    found = json.loads(file.read_text())
    assert [*mismatches(RESULT, found)] == []
    return found


def measured(stub: Stub, *, after: int) -> Sequence[Any]:
    """The generations but the first one, which only tries, and those to warm up with."""
    return stub.generations[1 + after :]


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-concurrency", "2", "--num-prompts", "6", "--input-len", "5", "--output-len", "4"]
    flags += [
        "--goodput",
        "ttft:1000",
        "tpot:10",
        "--json",
        str(tmp_path / "x.json"),
        "--html",
        str(tmp_path / "x.html"),
    ]
    with stub_server(Behaviour(ttft=0.05, itl=0.03)) as stub:
        assert bench(stub, *flags) == 0
    requests = measured(stub, after=2)
    assert len(requests) == 6
    assert max(seen.running for seen in requests) == 2
    assert all(len(seen.body["prompt"]) == 5 and seen.body["max_tokens"] == 4 for seen in requests)
    assert all(seen.body["ignore_eos"] is True and seen.body["model"] == "stub" for seen in requests)
    found = results(tmp_path / "x.json")
    assert (found["base_url"], found["model_id"], found["dataset"]) == (stub.url, "stub", "random")
    (run,) = found["runs"]
    assert (run["completed"], run["failed"], run["max_concurrency"]) == (6, 0, 2)
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (60, 24), "as the server counts"
    # A busy machine may see a chunk late, but never early.
    assert 0.4 < run["duration"] < 4
    assert 49 < run["median_ttft_ms"] < 500
    assert 15 < run["median_tpot_ms"] < 300
    assert 10 < run["median_itl_ms"] < 300
    assert 139 < run["median_e2el_ms"] < 1400
    assert run["output_throughput"] == pytest.approx(24 / run["duration"])
    assert run["request_goodput"] == 0
    assert "<svg" in (tmp_path / "x.html").read_text()
    out, errors = capsys.readouterr()
    assert "6 in " in out
    assert "0 failed" in out
    assert "0%, within ttft:1000 tpot:10" in out
    assert errors == "", "the progress bar is for terminals"


def test_a_sweep_warms_up_and_has_prompts_of_its_own_at_each_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--sweep", "1,3,4", "--output-len", "20", "--json", str(tmp_path / "x.json")]
    with stub_server(Behaviour()) as stub:
        assert bench(stub, *flags) == 0
    kinds = [("warm" if seen.body["max_tokens"] == 16 else "run", seen.running) for seen in stub.generations]
    assert [kind for kind, _ in kinds] == (
        ["warm"] + ["warm"] + ["run"] * 16 + ["warm"] * 3 + ["run"] * 16 + ["warm"] * 4 + ["run"] * 16
    )
    prompts = [tuple(seen.body["prompt"]) for seen in stub.generations]
    assert len(set(prompts)) == len(prompts), "none is asked twice: it would be in the server's prefix cache"
    assert [run["max_concurrency"] for run in results(tmp_path / "x.json")["runs"]] == [1, 3, 4]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["streams", "1", "3", "4"]


def test_the_seed_decides_what_is_asked() -> None:
    def prompts(seed: str) -> list[Any]:
        with stub_server() as stub:
            bench(stub, "--seed", seed, "--max-concurrency", "1", "--range-ratio", "0.5", "--output-len", "2")
        return [(seen.body["prompt"], seen.body["max_tokens"]) for seen in stub.generations]

    assert prompts("3") == prompts("3")
    assert prompts("3") != prompts("4")


def test_arrivals_by_chance() -> None:
    with stub_server(Behaviour(ttft=0.3)) as stub:
        assert bench(stub, "--request-rate", "40", "--num-prompts", "20", "--output-len", "1") == 0
    requests = measured(stub, after=8)
    gaps = [later.arrived - sooner.arrived for sooner, later in pairwise(requests)]
    assert max(seen.running for seen in requests) > 5, "they do not wait for answers"
    assert 0.4 / 40 < sum(gaps) / len(gaps) < 10 / 40
    assert max(gaps) > 2 * min(gaps)


def test_shared_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "shared-prefix", "--prefix-len", "6", "--num-prefixes", "2", "--input-len", "3"]
    with stub_server(Behaviour(cached_tokens=9)) as stub:
        assert bench(stub, *flags, "--output-len", "2", "--num-prompts", "4", "--max-concurrency", "1") == 0
    prompts = [seen.body["prompt"] for seen in measured(stub, after=1)]
    assert [len(prompt) for prompt in prompts] == [9] * 4
    assert prompts[0][:6] == prompts[2][:6] != prompts[1][:6] == prompts[3][:6]
    assert "50% of the input tokens were in it" in capsys.readouterr().out


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_file(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "first"}\n{"prompt": "second", "max_tokens": 2}\n')
    with stub_server() as stub:
        assert (
            bench(stub, "--dataset", str(file), "--endpoint", endpoint, "--output-len", "5", "--max-concurrency", "1")
            == 0
        )
    requests = measured(stub, after=1)
    assert [seen.body["max_tokens"] for seen in requests] == [5, 2]
    if endpoint == "chat":
        assert requests[0].body["messages"] == [{"role": "user", "content": "first"}]
    else:
        assert [seen.body["prompt"] for seen in requests] == ["first", "second"]
        assert len(stub.generations[1].body["prompt"].split(" ")) == 32
    assert not any("ignore_eos" in seen.body for seen in stub.generations), "answers end where they end"
    assert not any("first" in json.dumps(seen.body) for seen in stub.generations[:2]), "nor are they warmed up with"


def test_a_chat_is_of_words_that_the_server_counts() -> None:
    with stub_server(Behaviour(vocab_size=100)) as stub:
        assert bench(stub, "--endpoint", "chat", "--input-len", "100", "--output-len", "2", "--num-prompts", "2") == 0
    (message,) = stub.generations[-1].body["messages"]
    assert message["role"] == "user"
    length = len(f" {message['content']}")
    assert 100 <= length < 115, "a token a character"


def test_a_server_that_takes_no_ids_gets_texts(capsys: pytest.CaptureFixture[str]) -> None:
    def reply(_: int, body: dict[str, Any]) -> Reply | None:
        return None if isinstance(body["prompt"], str) else (422, {"error": {"message": "not a string"}})

    with stub_server(Behaviour(reply=reply)) as stub:
        assert bench(stub, "--max-concurrency", "1", "--input-len", "7", "--output-len", "2") == 0
    assert len(stub.generations[-1].body["prompt"].split(" ")) == 7
    assert "prompts are texts, since the server refuses token ids: not a string" in capsys.readouterr().err


def test_ids_are_of_the_vocabulary() -> None:
    with stub_server(Behaviour(vocab_size=60)) as stub:
        assert bench(stub, "--max-concurrency", "1", "--output-len", "2") == 0
    ids = {token for seen in stub.generations for token in seen.body["prompt"]}
    assert ids == {*range(10, 60)}


def test_another_tokenizer(tmp_path: Path) -> None:
    """Its control tokens are in no prompt, and the server is not asked about tokens."""
    write_byte_tokenizer(tmp_path)
    flags = ["--tokenizer", str(tmp_path), "--max-concurrency", "1", "--input-len", "60", "--output-len", "2"]
    with stub_server(Behaviour(vocab_size=50)) as stub:
        assert bench(stub, *flags, "--num-prompts", "100") == 0
        assert bench(stub, *flags, "--endpoint", "chat", "--num-prompts", "2") == 0
    ids = {token for seen in stub.generations if "prompt" in seen.body for token in seen.body["prompt"]}
    assert ids == {*range(10, 256)}
    assert {seen.path for seen in stub.seen} == {"/v1/models", "/v1/completions", "/v1/chat/completions"}
    assert 60 <= len(f" {stub.generations[-1].body['messages'][0]['content']}") < 75


def test_errors_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(number: int, _: object) -> Reply | None:
        return {5: (503, {"error": {"message": "busy"}}), 6: (200, b"data: x\n\n"), 7: (503, {})}.get(number)

    with stub_server(Behaviour(reply=reply)) as stub:
        flags = [
            "--max-concurrency",
            "1",
            "--output-len",
            "2",
            "--num-prompts",
            "10",
            "--json",
            str(tmp_path / "x.json"),
        ]
        assert bench(stub, *flags) == 0
    (run,) = results(tmp_path / "x.json")["runs"]
    assert (run["completed"], run["failed"], run["total_output_tokens"]) == (7, 3, 14)
    assert {kind: error["count"] for kind, error in run["errors"].items()} == {"HTTP 503": 2, "bad chunk": 1}
    assert run["errors"]["HTTP 503"]["message"] == "busy"
    assert "2 failed with HTTP 503: busy" in capsys.readouterr().out


def test_memory_of_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.bench.memory._INTERVAL", 0.05)
    with stub_server(Behaviour(itl=0.02)) as stub:
        flags = ["--max-concurrency", "1", "--num-prompts", "2", "--output-len", "8", "--server-pid", str(os.getpid())]
        assert bench(stub, *flags, "--json", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")) == 0
    found = results(tmp_path / "x.json")
    assert len(found["memory"]) >= 3
    assert 10e6 < found["runs"][0]["peak_memory_bytes"] <= max(size for _, size in found["memory"])
    assert "Memory of the server" in (tmp_path / "x.html").read_text()
    assert "GB of the server" in capsys.readouterr().out


def test_chunks_are_tokens_where_nobody_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub_server(Behaviour(usage=False)) as stub:
        flags = ["--max-concurrency", "1", "--num-prompts", "2", "--input-len", "5", "--output-len", "3"]
        assert bench(stub, *flags, "--json", str(tmp_path / "x.json")) == 0
    (run,) = results(tmp_path / "x.json")["runs"]
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (10, 6)
    assert run["output_tokens_counted_by"] == "chunks"
    assert "taking each chunk for a token" in capsys.readouterr().out


def failing(from_number: int) -> Behaviour:
    refusal = (500, {"error": {"message": "the engine\nis gone"}})
    return Behaviour(reply=lambda number, _: refusal if number >= from_number else None)


@pytest.mark.parametrize(
    ("behaviour", "flags", "message"),
    [
        (failing(0), [], "the first request failed: HTTP 500: the engine is gone"),
        (
            Behaviour(reply=lambda *_: (400, {"error": {"message": "too long"}})),
            [],
            "the first request failed: HTTP 400: too long",
        ),
        (failing(1), ["--num-prompts", "3"], "all 3 requests failed: HTTP 500: the engine is gone"),
        (Behaviour(), ["--model", "other"], "the server has no model other; it has stub"),
        (Behaviour(), ["--server-pid", "4194305"], "there is no process 4194305 whose memory can be read in /proc"),
        (Behaviour(), ["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json"),
        (Behaviour(), ["--html", "/"], "cannot write /"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    behaviour: Behaviour, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub_server(behaviour) as stub:
        assert bench(stub, *flags) == 1
    out, errors = capsys.readouterr()
    assert (out, errors) == ("", f"mixserve: error: {message}\n")


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["bench", "serve", "--base-url", f"{url}/v1"]) == 1
    assert capsys.readouterr().err == f"mixserve: error: no server answers at {url}: connection refused\n"


def test_a_sweep_that_dies_keeps_what_it_has(tmp_path: Path) -> None:
    with stub_server(failing(20)) as stub:
        files = ["--json", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")]
        assert bench(stub, "--sweep", "1,2,4", "--output-len", "2", *files) == 1
    assert [run["max_concurrency"] for run in results(tmp_path / "x.json")["runs"]] == [1]
    assert (tmp_path / "x.html").exists()


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    with stub_server() as stub:
        flags = ["--max-concurrency", "1", "--num-prompts", "1", "--output-len", "1"]
        assert bench(stub, *flags) == 0
        monkeypatch.setenv("MIXSERVE_API_KEY", "first")
        assert bench(stub, *flags) == 0
        assert bench(stub, *flags, "--api-key", "mine") == 0
    keys = [seen.headers["authorization"].removeprefix("Bearer ") for seen in stub.seen]
    assert list(dict.fromkeys(keys)) == ["second", "first", "mine"]
    assert keys == sorted(keys, key=["second", "first", "mine"].index)
