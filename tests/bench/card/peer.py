"""Part "peer": the same model and prompts by transformers, in a process of its own, and by the engine.

Both make random weights of the same shapes on the device, and route as their routers happen to: each row says how many
experts a step reached. Where the whole model in its own dtype does not fit, both have as many layers as do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.card.engines import Variant, add, build, finish, model_folder, warm_up
from tests.bench.card.models import TINY, as_deep_as_fits
from tests.bench.card.packages import environment_with
from tests.bench.card.report import BUILD_SECONDS, Part, Setting
from weights.config import ModelConfig

GOAL = 5.0
"""Times as many tokens as the peer's."""


@dataclass(frozen=True, slots=True)
class Work:
    """`batch` greedy prompts at once, `rounds` times."""

    batch: int
    input_len: int
    output_len: int
    rounds: int


WORK = Work(32, 128, 128, 3)
TINY_WORK = Work(3, 8, 6, 1)
SPARE_TOKENS = 4096
"""As many tokens of KV cache more than the work has are left free: the peer's cache grows by copies."""


def peer(setting: Setting, part: Part) -> None:
    """Tables: engines, a row each; ratio."""
    work = TINY_WORK if setting.tiny else WORK
    part.set(batch=work.batch, input_len=work.input_len, output_len=work.output_len, rounds=work.rounds)
    num_tokens = work.batch * (work.input_len + work.output_len) + SPARE_TOKENS
    config = TINY if setting.tiny else as_deep_as_fits(setting.device, num_tokens)
    keys = {"num_layers": config.num_layers, "dtype": config.dtype}
    if not part.rows("engines", engine="transformers", **keys):
        theirs = _transformers(setting, part, config, work)
        if theirs is None:
            return
        part.row("engines", engine="transformers", **keys, **theirs)
    if not part.rows("engines", engine="mixserve", **keys):
        if not part.has_time("mixserve", seconds=BUILD_SECONDS):
            return
        part.row("engines", engine="mixserve", **keys, **_mixserve(setting, config, work))
    (theirs,), (ours,) = (part.rows("engines", engine=name, **keys) for name in ("transformers", "mixserve"))
    if not part.rows("ratio"):
        ratios = {name: ours[name] / theirs[name] for name in ("output_tok_s", "prefill_tok_s", "decode_tok_s")}
        part.row("ratio", **ratios, goal=GOAL)


def rates(work: Work, first: list[float], whole: list[float]) -> dict[str, float]:
    """Tokens a second, from the seconds of the rounds for one token of each answer and for all of them."""
    one, everything = statistics.median(first), statistics.median(whole)
    return {
        "output_tok_s": work.batch * work.output_len / everything,
        "prefill_tok_s": work.batch * work.input_len / one,
        # Of a tiny model on a busy machine, the longer run may be the faster one.
        "decode_tok_s": work.batch * (work.output_len - 1) / max(everything - one, 1e-3),
    }


def _transformers(setting: Setting, part: Part, config: ModelConfig, work: Work) -> dict[str, Any] | None:
    """In another process, which gives all its memory back at its end."""
    with environment_with(setting, part, ["transformers"]) as environment, model_folder(config) as folder:
        if environment is None:
            return None
        sizes = (work.batch, work.input_len, work.output_len, work.rounds)
        script = Path(__file__).with_name("transformers_peer.py")
        result = subprocess.run(
            [sys.executable, str(script), str(folder), str(setting.device), *map(str, sizes)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=part.most_seconds,
        )
    if result.returncode != 0:
        raise RuntimeError(f"transformers failed: {result.stdout}{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return rates(work, found.pop("first"), found.pop("whole")) | found


def _mixserve(setting: Setting, config: ModelConfig, work: Work) -> dict[str, Any]:
    longest = work.input_len + work.output_len
    core = build(setting, config, Variant(None, "auto", "free"), max_model_len=longest, max_num_seqs=work.batch)
    warm_up(core, longest)

    def seconds(name: str, output_len: int) -> float:
        return finish(core, add(core, name, work.batch, work.input_len, output_len))[1]

    seconds("prompt", work.output_len)  # the batch's own first use
    first, whole = [], []
    for _ in range(work.rounds):
        first.append(seconds("prompt", 1))
        whole.append(seconds("prompt", work.output_len))
    window = core.routing_record().snapshot().window
    distinct = window.hits[window.tokens == work.batch].sum(dim=-1).double().mean()
    return rates(work, first, whole) | {"version": core.info.backend, "distinct_experts": float(distinct)}
