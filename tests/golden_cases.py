"""tests/golden/smollm2_greedy.json: greedy answers of transformers, token by token (its `source` says how)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GoldenCase:
    kind: str
    prompt: str
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    logprobs: list[float]
    min_top2_gap: float


def _read() -> list[GoldenCase]:
    data = json.loads((Path(__file__).parent / "golden" / "smollm2_greedy.json").read_text(encoding="utf-8"))
    return [GoldenCase(**case) for case in data["cases"]]


GOLDEN = _read()
