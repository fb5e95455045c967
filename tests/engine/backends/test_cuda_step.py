"""A step of the GPU's backend over tensors that have shapes and no contents: whoever asks for contents on the host, or
for a shape that depends on them, fails. So nothing in a step waits for the device.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.cuda import backend as cuda
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.card import Card
from engine.backends.cuda.launch import Launch
from engine.backends.select import make_backend
from engine.batch import Batch, build
from engine.errors import ConfigurationError
from engine.models.registry import build_model
from engine.routing.base import RoutingInputs
from engine.routing.record import RoutingRecord
from engine.routing.select import make_router
from engine.routing.steering import SteeringTable
from engine.types import Steering
from tests.engine.backends.test_cpu import make_plan
from tests.tiny import TINY_MIXTRAL
from weights.config import ModelConfig
from weights.families import family_of

META = torch.device("meta")
H100 = Card((9, 0), 132)
CONFIG = replace(TINY_MIXTRAL, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=32)
BATCHES = {
    "decodes": [(5, 1), (70, 1), (0, 1)],
    "long decode": [(9000, 1)],
    "mixed": [(13, 1), (0, 7), (9, 4), (2, 1)],
    "prompt": [(0, 5000)],
    "long prompt": [(0, 40_000)],
}
ROUTERS: list[dict[str, Any]] = [
    {},
    {"router": "switch", "capacity_factor": 1.0},
    {"router": "gshard", "capacity_factor": 1.25},
    {"router": "noisy_topk"},
    {"capacity_factor": 0.8},
    {"simulation": "even"},
    {"simulation": "zipf"},
    {"simulation": "one"},
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What was launched, and was not run."""
    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))

    def scaled_grouped_mm(x: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        """Torch does not tell its shape."""
        return torch.empty(x.shape[0], weights.shape[2], dtype=torch.bfloat16, device=META)

    monkeypatch.setattr(F, "scaled_grouped_mm", scaled_grouped_mm)
    return launched


def run_step(
    sizes: list[tuple[int, int]],
    *,
    card: Card = H100,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    config: ModelConfig = CONFIG,
    **router_options: Any,
) -> Tensor:
    """The logits of a step."""
    backend = CudaBackend(config, card, device=META, dtype=dtype, weight_dtype=weight_dtype)
    for piece in family_of(config).pieces(config):
        backend.prepare(piece, torch.empty(piece.shape, dtype=dtype, device=META))
    options: dict[str, Any] = {"router": None, "capacity_factor": None, "simulation": None} | router_options
    decoder = build_model(config, backend, make_router(config, **options))
    batch = without_contents(sizes, config)
    cache = backend.new_kv_cache(config.num_layers, 8, 16, decoder.attention_shape)
    record = RoutingRecord(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        max_tokens=batch.num_tokens,
        device=META,
    )
    with torch.inference_mode():
        hidden = decoder.forward(batch, cache, record)
        record.reduce(batch.routing)
        return decoder.logits(hidden, batch.logits_indices)


def without_contents(sizes: list[tuple[int, int]], config: ModelConfig) -> Batch:
    table = SteeringTable.for_model(config, num_slots=len(sizes) + 1, device=torch.device("cpu"))
    steerings: list[Steering | None] = [Steering(experts_per_token=1), *[None] * (len(sizes) - 1)]
    plan, _ = make_plan(sizes, steerings)
    batch = build(plan, block_size=16, steering=table, device=torch.device("cpu"))
    return replace(batch, routing=_emptied(batch.routing), **_tensors(batch))


def _emptied(inputs: RoutingInputs) -> RoutingInputs:
    return replace(inputs, **_tensors(inputs))


def _tensors(value: Batch | RoutingInputs) -> dict[str, Any]:
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: tensor.to(META) for name, tensor in found.items() if isinstance(tensor, Tensor)}


@pytest.mark.parametrize("weight_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_no_contents_are_read(batch: str, weight_dtype: torch.dtype | None, launches: list[Launch]) -> None:
    logits = run_step(BATCHES[batch], weight_dtype=weight_dtype)
    assert logits.shape == (len(BATCHES[batch]), CONFIG.vocab_size)
    assert logits.dtype == torch.float32
    kernels = {launch.kernel.__name__ for launch in launches}
    assert {"add_rms_norm", "rotary_write", "paged_attention", "sum_kernel"} <= kernels


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("batch", ["mixed", "prompt"])
@pytest.mark.usefixtures("launches")
def test_whatever_the_router(batch: str, options: dict[str, Any]) -> None:
    config = replace(CONFIG, router_type="noisy_topk") if options.get("router") == "noisy_topk" else CONFIG
    run_step(BATCHES[batch], config=config, **options)


@pytest.mark.parametrize(
    ("capability", "weight_dtype", "said"),
    [
        ((8, 0), torch.int8, ["the experts are int8", "prompts take the decode kernels"]),
        ((8, 9), torch.float8_e4m3fn, ["prompts take the decode kernels"]),
        ((9, 0), torch.float8_e4m3fn, []),
    ],
)
def test_the_next_best_path_is_taken_and_said_once(
    capability: tuple[int, int],
    weight_dtype: torch.dtype,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[torch.dtype] = []
    monkeypatch.setattr(Card, "of", lambda _: Card(capability, 100))
    monkeypatch.setattr(cuda, "CudaBackend", lambda *_, weight_dtype, **__: made.append(weight_dtype))
    gpu = torch.device("cuda")
    make_backend("cuda", CONFIG, device=gpu, dtype=torch.bfloat16, quantization="fp8")
    assert made == [weight_dtype]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    assert all(part in message for part, message in zip(said, messages, strict=True))


def test_a_card_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, "of", lambda _: Card((7, 5), 40))
    with pytest.raises(ConfigurationError, match=r"8\.0 and newer, this card has 7\.5"):
        make_backend("cuda", CONFIG, device=torch.device("cuda"), dtype=torch.float16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("launches")
def test_whatever_the_card(capability: tuple[int, int], dtype: torch.dtype) -> None:
    run_step(BATCHES["mixed"], card=Card(capability, 100), dtype=dtype)


def test_few_launches_for_a_layer(launches: list[Launch]) -> None:
    """A decode is short: what is launched for it, by hand beside three products of torch, is counted."""
    run_step(BATCHES["decodes"])
    layers = CONFIG.num_layers
    assert len(launches) <= 8 * layers + 1, [launch.kernel.__name__ for launch in launches]


def test_this_would_see_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CudaBackend.route

    def waiting(self: CudaBackend, layer: int, logits: Tensor, inputs: RoutingInputs, **options: Any) -> Any:
        logits.max().item()
        return original(self, layer, logits, inputs, **options)

    monkeypatch.setattr(Launch, "run", lambda _: None)
    monkeypatch.setattr(CudaBackend, "route", waiting)
    with pytest.raises(RuntimeError, match="meta"):
        run_step(BATCHES["mixed"])
