"""An engine core without a model: every live request gets one token a step, at a steady pace.

Its options are the JSON in `EngineConfig.model`: {"step_seconds": 0.032, "tokenizer": "a folder"}. Tokens are those of
TEXT over and over, so that words, punctuation and characters split over tokens come as they do in an answer; each
request begins at another place. It records no routing, so nobody asks it for any.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig
from engine.grammar.vocabulary import GrammarVocabulary
from engine.text import Tokenizer
from engine.types import EngineInfo, EngineStats, FinishReason, Request, TokenEvent, TokenLogprobs
from tests.engine.infos import engine_info

CORE = f"{__name__}:StubCore.build"
VOCAB_SIZE = 32000
MAX_MODEL_LEN = 32768
MAX_TOP = 20
TEXT = """The lighthouse keeper wrote everything down: the wind, the ships, the colour of the sea at noon. "Nothing \
happens here," he told his daughter, "and I have 1,482 pages that prove it." She laughed — people in the harbour said \
she always did — and asked what he would do with them.

1. Read them again in winter.
2. Give the café on the quay the pages about storms; their guests like to be frightened.
3. Burn the rest, naïve as they were. 😀

```python
def pages(days: int, per_day: float = 2.5) -> int:
    return round(days * per_day)
```
"""


@dataclass(slots=True)
class _Live:
    request: Request
    first: int
    """Where in the text its answer begins."""
    limit: int
    num_output: int = 0


class StubCore:
    """See the module."""

    def __init__(self, info: EngineInfo, token_ids: list[int], step_seconds: float) -> None:
        self.info = info
        self._tokens = token_ids
        self._scores = [_score(token_ids, place) for place in range(len(token_ids))]
        self._step_seconds = step_seconds
        self._live: dict[str, _Live] = {}
        self._num_added = 0
        self._num_tokens = 0
        self._num_steps = 0
        self._last = 0.0

    @classmethod
    def build(cls, config: EngineConfig, *, progress: bool) -> StubCore:
        del progress
        options = json.loads(config.model)
        tokenizer = Tokenizer.load(Path(options["tokenizer"]))
        info = engine_info(
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=config.max_num_seqs,
            num_blocks=65536,
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            record_routing=False,
            pid=os.getpid(),
        )
        return cls(info, tokenizer.encode(TEXT, add_special_tokens=False), options["step_seconds"])

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def use_vocabulary(self, vocabulary: GrammarVocabulary) -> None:
        """This core follows no grammar."""

    def add(self, request: Request) -> None:
        limit = request.params.max_tokens or MAX_MODEL_LEN
        limit = min(limit, MAX_MODEL_LEN - len(request.prompt_ids))
        self._live[request.request_id] = _Live(request, 17 * self._num_added % len(self._tokens), limit)
        self._num_added += 1

    def abort(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        """One token for everybody, `step_seconds` after the last step, or at once if that was longer ago."""
        due = max(time.monotonic(), self._last + self._step_seconds)
        time.sleep(max(0.0, due - time.monotonic()))
        self._last = due
        self._num_steps += 1
        events = [self._advance(live) for live in self._live.values()]
        for event in events:
            if event.finish_reason is not None:
                del self._live[event.request_id]
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live),
            num_blocks=self.info.num_blocks,
            num_free_blocks=self.info.num_blocks - 40 * len(self._live),
            prompt_tokens=20 * self._num_added,
            generation_tokens=self._num_tokens,
            num_steps=self._num_steps,
            peak_memory_bytes=2**30,
        )

    def _advance(self, live: _Live) -> TokenEvent:
        params = live.request.params
        num_top, first = params.logprobs, live.num_output == 0
        place = (live.first + live.num_output) % len(self._tokens)
        live.num_output += 1
        self._num_tokens += 1
        score = self._scores[place]
        return TokenEvent(
            request_id=live.request.request_id,
            token_ids=(self._tokens[place],),
            logprobs=None if num_top is None else (replace(score, top=score.top[:num_top]),),
            queue_seconds=0.01 if first else None,
            finish_reason=FinishReason.LENGTH if live.num_output == live.limit else None,
        )


def _score(token_ids: list[int], place: int) -> TokenLogprobs:
    """A made-up log probability; the other likely tokens are those that follow."""
    likely = [token_ids[(place + n) % len(token_ids)] for n in range(MAX_TOP)]
    top = tuple((token_id, -math.exp(n / 3) - place / 1000) for n, token_id in enumerate(likely))
    return TokenLogprobs(token_ids[place], top[0][1], 1, top)
