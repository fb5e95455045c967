"""A dense model becomes a mixture: one calibration pass here, the files in weights/upcycle.py.

Equal experts compute what the dense block computed (Komatsuzaki et al. 2022, arXiv 2212.05055), so all that is to be
found is a router that spreads the load as a trained one does. Its rows are drawn at random in the space orthogonal to
what all tokens of a layer have in common: the mean input and the leading principal directions, which this pass
measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.torch import TorchBackend
from engine.batch import build as build_batch
from engine.errors import ConfigurationError
from engine.models.decoder import Decoder
from engine.models.mixtral import build as build_mixtral
from engine.routing.base import Routing
from engine.routing.plan import ExpertPlan
from engine.routing.steering import SteeringTable
from engine.routing.topk_softmax import TopKSoftmax
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence as EngineSequence
from engine.text import Tokenizer
from engine.types import Request, SamplingParams
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.families.mixtral import param_specs
from weights.files import check_new
from weights.loader import load
from weights.params import ParamSpec, Piece
from weights.reader import resolve
from weights.upcycle import calibration_text, router_rows, write_mixtral

_TEXT_TOKENS = 2048
_RANDOM_TOKENS = 2048
_CHUNK = 256
_TOP_K = 2
_PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """How evenly the new router spreads tokens, averaged over layers.

    `distinct_experts`: batch size -> experts that a batch of so many tokens reaches. The imbalances are the load of the
    busiest expert over the mean load: 1.0 is even.
    """

    distinct_experts: dict[int, float]
    imbalance_text: float
    imbalance_random: float


def upcycle(
    dense: str, out: Path, *, num_experts: int, noise: float, seed: int, progress: bool = False
) -> UpcycleReport:
    """Write a Mixtral checkpoint of `num_experts` experts, top-2, to `out`, from the dense Llama or Mistral model
    `dense`.

    `noise` is the standard deviation of what is added to each expert, as a share of its tensor's own. Raises
    WeightsError and ConfigurationError.
    """
    if num_experts < 2:
        raise ConfigurationError(f"a mixture needs at least 2 experts, not {num_experts}")
    check_new(out)  # said now rather than after a long calibration
    path = resolve(dense)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    if config.num_experts != 1:
        raise ConfigurationError(f"{dense} is a mixture already ({config.num_experts} experts): upcycling starts dense")
    tokenizer = Tokenizer.load(path)
    backend = _WatchedBackend(param_specs(config))
    load(checkpoint, backend, progress=progress)
    for layer in range(config.num_layers):
        gate = torch.zeros(1, config.hidden_size)
        backend.prepare(Piece("", (1, config.hidden_size), f"layers.{layer}.gate"), gate)
    model = _Dense(config, backend, build_mixtral(config, backend, TopKSoftmax(1, renormalize=True)))

    text = tokenizer.encode(calibration_text())[:_TEXT_TOKENS]
    random = _random_ids(config, seed)
    moments = [_Moments(config.hidden_size) for _ in range(config.num_layers)]
    for inputs in model.expert_inputs(text + random):
        for moment, x in zip(moments, inputs, strict=True):
            moment.add(x)
    routers = [
        router_rows(moment.mean, moment.covariance, num_experts, seed=seed * config.num_layers + layer)
        for layer, moment in enumerate(moments)
    ]
    report = _evaluate(model, routers, text=text, random=_random_ids(config, seed + 1))
    write_mixtral(checkpoint, out, routers=routers, num_experts=num_experts, noise=noise, seed=seed)
    return report


class _WatchedBackend(TorchBackend):
    """Keeps what the experts of each layer were given since `expert_inputs` was last emptied."""

    def __init__(self, specs: Iterable[ParamSpec]) -> None:
        super().__init__(specs, device=torch.device("cpu"), dtype=torch.float32)
        self.expert_inputs: list[Tensor] = []

    def experts(self, w13: str, w2: str, x: Tensor, routing: Routing, plan: ExpertPlan) -> Tensor:
        self.expert_inputs.append(x)
        return super().experts(w13, w2, x, routing, plan)


@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense model, as a mixture of one expert."""

    config: ModelConfig
    backend: _WatchedBackend
    decoder: Decoder

    def expert_inputs(self, ids: list[int]) -> Iterator[list[Tensor]]:
        """Run `ids` in sequences of at most `_CHUNK` tokens: for each, the input [T, D] of every layer's sparse
        block."""
        length = min(_CHUNK, self.config.max_position_embeddings)
        cache = self.backend.new_kv_cache(self.config.num_layers, 1, length, self.decoder.attention_shape)
        steering = SteeringTable.for_model(self.config, num_slots=1, device=self.backend.device)
        for start in range(0, len(ids), length):
            request = Request(request_id="calibration", prompt_ids=tuple(ids[start : start + length]), params=_PARAMS)
            sequence = EngineSequence(request, arrival=0, seed=0)
            sequence.block_table = [0]
            plan = StepPlan((Chunk(sequence, 0, sequence.num_tokens),))
            batch = build_batch(plan, block_size=length, steering=steering, device=self.backend.device)
            self.backend.expert_inputs.clear()
            with torch.inference_mode():
                self.decoder.forward(batch, cache)
            yield list(self.backend.expert_inputs)


class _Moments:
    """Mean and covariance of the rows that were added, in float64."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._outer = torch.zeros(size, size, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        rows = x.double()
        self._count += rows.shape[0]
        self._sum += rows.sum(0)
        self._outer += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        return self._outer / self._count - torch.outer(self.mean, self.mean)


def _random_ids(config: ModelConfig, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(config.vocab_size, (_RANDOM_TOKENS,), generator=generator).tolist()
    return ids


def _evaluate(model: _Dense, routers: Sequence[Tensor], *, text: list[int], random: list[int]) -> UpcycleReport:
    """Route text and fresh random ids by the new routers, over the inputs that the dense model gives."""
    chosen = {name: list(_route(model, routers, ids)) for name, ids in (("text", text), ("random", random))}
    num_experts = routers[0].shape[0]
    loads = {
        name: [torch.bincount(ids.flatten(), minlength=num_experts).double() for ids in layers]
        for name, layers in chosen.items()
    }
    imbalance = {
        name: sum(float(load.max() / load.mean()) for load in layers) / len(layers) for name, layers in loads.items()
    }
    distinct = {size: sum(_distinct(ids, size) for ids in chosen["random"]) / len(routers) for size in (1, 8, 16, 32)}
    return UpcycleReport(distinct, imbalance["text"], imbalance["random"])


def _route(model: _Dense, routers: Sequence[Tensor], ids: list[int]) -> Iterator[Tensor]:
    """The experts [T, 2] that each layer's router chooses for `ids`."""
    chosen: list[list[Tensor]] = [[] for _ in routers]
    for inputs in model.expert_inputs(ids):
        for parts, x, router in zip(chosen, inputs, routers, strict=True):
            parts.append((x @ router.to(x.dtype).T).topk(_TOP_K, dim=-1).indices)
    return (torch.cat(parts) for parts in chosen)


def _distinct(expert_ids: Tensor, size: int) -> float:
    """Mean number of distinct experts over groups of `size` tokens drawn at random, as the sequences of a decode batch
    have nothing to do with each other; expert_ids [T, K]."""
    shuffled = expert_ids[torch.randperm(expert_ids.shape[0], generator=torch.Generator().manual_seed(0))]
    groups = shuffled[: shuffled.shape[0] // size * size].view(-1, size * expert_ids.shape[1])
    distinct: list[int] = [group.unique().numel() for group in groups]
    return sum(distinct) / len(distinct)
