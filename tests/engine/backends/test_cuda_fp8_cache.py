"""The whole engine with a KV cache of e4m3, through Triton's interpreter: against the reference, whose keys and values
torch rounds to e4m3, and against the same engine with a float32 cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from engine import startup
from engine.backends.base import KVCache
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.card import Card
from engine.backends.reference import ReferenceBackend
from engine.core import EngineCore
from engine.errors import ConfigurationError
from engine.executor import LocalExecutor
from engine.types import Request
from tests.engine.cores import greedy, make_core, run
from tests.tiny import TINY_MIXTRAL, write_tiny_mixtral
from weights.config import ModelConfig

pytestmark = pytest.mark.interpreter

E4M3 = torch.float8_e4m3fn
H100 = Card((9, 0), 132)
ROOM = 1 << 20


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off what e4m3 has no bits for; a card rounds to nearest, as torch does."""
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target != tl.float8e4nv or source != tl.float32:
            return original(values, source, target, rounding_mode)
        wide = np.frombuffer(values.tobytes(), dtype=np.float32).reshape(values.shape)
        return torch.from_numpy(wide.copy()).to(E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def use_cuda(monkeypatch: pytest.MonkeyPatch, card: Card = H100) -> None:
    def make(_: str, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, **__: Any) -> CudaBackend:
        return CudaBackend(config, card, device=device, dtype=dtype)

    monkeypatch.setattr(startup, "make_backend", make)


def round_in_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    write = ReferenceBackend.write_kv

    def rounded(
        self: ReferenceBackend, cache: KVCache, layer: int, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        write(self, cache, layer, keys.to(E4M3).to(keys.dtype), values.to(E4M3).to(values.dtype), slots)

    monkeypatch.setattr(ReferenceBackend, "write_kv", rounded)


def requests() -> list[Request]:
    shared = [(5 * i + 3) % TINY_MIXTRAL.vocab_size for i in range(11)]
    prompts = [shared, [*shared[:8], 2], [1], [(7 * i) % TINY_MIXTRAL.vocab_size for i in range(23)], [9, 8, 9, 8]]
    return [greedy(str(index), prompt, 16) for index, prompt in enumerate(prompts)]


def tokens_of(core: EngineCore) -> dict[str, list[int]]:
    events = run(core, *requests())
    return {name: [token for event in found for token in event.token_ids] for name, found in events.items()}


def test_tokens_are_those_of_keys_and_values_rounded_to_e4m3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_mixtral(tmp_path, seed=2)
    options: dict[str, Any] = {"kv_cache_memory_bytes": ROOM, "max_model_len": 64, "max_num_batched_tokens": 16}
    use_cuda(monkeypatch)
    core = make_core(tmp_path, backend="cuda", kv_cache_dtype="fp8", **options)
    assert isinstance(core._executor, LocalExecutor)
    cache = core._executor.runner.cache
    assert cache.keys.dtype == cache.values.dtype == E4M3
    narrow = tokens_of(core)
    wide = tokens_of(make_core(tmp_path, backend="cuda", **options))
    monkeypatch.undo()
    round_in_reference(monkeypatch)
    expected = tokens_of(make_core(tmp_path, backend="reference", **options))
    assert narrow == expected
    # One token that is nearly as likely as another, and the rest of the answer is another.
    same = sum(a == b for name in wide for a, b in zip(narrow[name], wide[name], strict=True))
    assert same == 64, "of 80 tokens as with a float32 cache; with another seed, all"


def test_a_token_takes_a_quarter_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_mixtral(tmp_path)
    use_cuda(monkeypatch)
    sizes = {"kv_cache_memory_bytes": ROOM, "max_model_len": 64}
    wide = make_core(tmp_path, backend="cuda", **sizes).info
    narrow = make_core(tmp_path, backend="cuda", kv_cache_dtype="fp8", **sizes).info
    assert narrow.num_blocks == 4 * wide.num_blocks
    assert narrow.memory.kv_cache == narrow.memory.measured["KV cache"] == ROOM


def test_a_card_that_reads_no_fp8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_mixtral(tmp_path)
    use_cuda(monkeypatch, Card((8, 6), 84))
    with pytest.raises(
        ConfigurationError, match=r"kv_cache_dtype fp8 needs a card of compute capability 8\.9 or newer"
    ):
        make_core(tmp_path, backend="cuda", kv_cache_dtype="fp8", max_model_len=64)
