"""schemathesis: requests made from the served OpenAPI document, good and bad, until one answer is not what it says.

Run as its own command, it is given what any client has: an address and a key. Its checks are all on but one. It looks
for 5xx, for statuses, content types, headers and bodies that are not documented, for bad requests that are let pass,
for methods that are not refused as they should be, and for routes that forget to ask for the key. Left out is that
good requests are taken: the document has no words for a prompt that is longer than the context, or for `best_of` below
`n`. That enough of them are is checked here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import MODEL, live_server

KEY = "sk-schemathesis"
NUM_EXAMPLES = 40
"""For each route and phase; more are made of intervals and enumerations."""


def test_no_request_gets_an_answer_that_is_not_documented(tokenizer: Tokenizer, tmp_path: Path) -> None:
    answer = tokenizer.encode("Hello from the fake engine.", add_special_tokens=False)
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(api_keys=(ApiKey.of(KEY),)))
    info = fake_info(max_model_len=4096, max_num_seqs=128)
    with live_server(lambda: FakeEngine(lambda _: answer, info=info, max_waiting=10_000), tokenizer, config) as live:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run", f"{live.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}", "--exclude-checks", "positive_data_acceptance"),
            *("--generation-deterministic", "--max-examples", str(NUM_EXAMPLES), "--continue-on-failure"),
            *("--exclude-path", "/v1/experts/events"),  # which does not end
            *("--workers", "1", "--request-timeout", "20", "--report", "ndjson", "--report-ndjson-path", "report"),
        ]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stdout + result.stderr
        statuses = answers(tmp_path / "report")
        assert not [status for _, status in statuses if status >= 500]
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert statuses[path, 200] >= 15, "good requests"
            assert statuses[path, 400] >= 15, "bad ones"
            assert statuses[path, 401] >= 1, "strangers"
        assert live.client.get("/health").status_code == 200
        assert live.engine.stats.num_running == live.engine.stats.num_waiting == 0


def answers(report: Path) -> Counter[tuple[str, int]]:
    """How often each path answered with each status."""
    found: Counter[tuple[str, int]] = Counter()
    for line in report.read_text().splitlines():
        for event in json.loads(line).values():
            for exchange in event.get("recorder", {}).get("interactions", {}).values():
                path = urlsplit(exchange["request"]["uri"]).path
                found[path, exchange["response"]["status_code"]] += 1
    return found
