from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY_LLAMA, TINY_MIXTRAL, tiny_tensors, write_tiny_mixtral
from tests.weights.gguf_files import write_gguf
from tests.weights.test_gguf_tokenizer import write as write_gguf_with_tokenizer
from weights import upcycle
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.config import ModelConfig, load_config
from weights.errors import CheckpointError
from weights.loader import match
from weights.seeds import named_generator
from weights.upcycle import calibration_text, router_rows, write_mixtral

DENSE = replace(
    TINY_LLAMA, num_heads=3, num_kv_heads=1, head_dim=10, hidden_size=48, vocab_size=71, eos_token_ids=(2, 5)
)


@pytest.fixture
def dense(tmp_path: Path) -> Checkpoint:
    write_tiny_mixtral(tmp_path / "dense", DENSE, shards=2)
    return open_checkpoint(tmp_path / "dense")


def gates(config: ModelConfig, num_experts: int) -> list[Tensor]:
    return [
        torch.randn(num_experts, config.hidden_size, generator=named_generator(i, "x"))
        for i in range(config.num_layers)
    ]


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    match(checkpoint)
    return {name: tensor.clone() for name, tensor in checkpoint.read()}


@pytest.mark.parametrize("num_experts", [1, 2, 5])
def test_equal_experts_are_copies_of_the_dense_block(tmp_path: Path, dense: Checkpoint, num_experts: int) -> None:
    routers = gates(DENSE, num_experts)
    write_mixtral(dense, tmp_path / "out", routers=routers, num_experts=num_experts)
    written, source = read(tmp_path / "out"), tiny_tensors(DENSE)
    assert load_config(tmp_path / "out") == replace(
        DENSE,
        model_type="mixtral",
        num_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
        dtype="bfloat16",
    )
    for i in range(DENSE.num_layers):
        moe = f"model.layers.{i}.block_sparse_moe"
        assert torch.equal(written.pop(f"{moe}.gate.weight"), routers[i].bfloat16())
        for projection, weight in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            block = source.pop(f"model.layers.{i}.mlp.{projection}_proj.weight").bfloat16()
            for e in range(num_experts):
                assert torch.equal(written.pop(f"{moe}.experts.{e}.{weight}.weight"), block)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in source.items())


def logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        result: Tensor = model(ids).logits
    return result


def test_transformers_computes_what_the_dense_model_computes(tmp_path: Path, dense: Checkpoint) -> None:
    ids = torch.arange(60).remainder(71)[None]
    expected = logits(tmp_path / "dense", ids)
    for name, noise in (("equal", 0.0), ("noisy", 0.3)):
        write_mixtral(dense, tmp_path / name, routers=gates(DENSE, 4), num_experts=4, noise=noise, dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path / "equal", ids), expected, rtol=1e-4, atol=1e-4)
    assert (logits(tmp_path / "noisy", ids) - expected).abs().max() > 0.1
    generation = json.loads((tmp_path / "equal" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": [2, 5]}


def test_noise_has_the_size_asked_for_and_differs_everywhere(tmp_path: Path, dense: Checkpoint) -> None:
    options: dict[str, Any] = {"routers": gates(DENSE, 3), "num_experts": 3, "dtype": torch.float32}
    write_mixtral(dense, tmp_path / "a", noise=0.25, seed=1, **options)
    write_mixtral(dense, tmp_path / "b", noise=0.25, seed=2, **options)
    source, first, second = tiny_tensors(DENSE), read(tmp_path / "a"), read(tmp_path / "b")
    drawn = []
    for name, tensor in first.items():
        if ".experts." not in name:
            assert torch.equal(tensor, second[name])
            continue
        parts = name.split(".")
        projection = {"w1": "gate", "w2": "down", "w3": "up"}[parts[-2]]
        block = source[f"model.layers.{parts[2]}.mlp.{projection}_proj.weight"]
        noise = (tensor - block) / block.std()
        assert noise.std().item() == pytest.approx(0.25, rel=0.08)
        assert abs(noise.mean().item()) < 0.03
        drawn += [noise.flatten()[:1900], (second[name] - block).div(block.std()).flatten()[:1900]]
    correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12  # 36 tensors: independent draws stay under 5 / sqrt(1900)


def test_noise_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    written = []
    for shards in (1, 3):
        write_tiny_mixtral(tmp_path / f"{shards}", DENSE, shards=shards)
        if shards > 1:
            reverse_shards(tmp_path / f"{shards}")
        checkpoint = open_checkpoint(tmp_path / f"{shards}")
        out = tmp_path / f"out{shards}"
        write_mixtral(checkpoint, out, routers=gates(DENSE, 2), num_experts=2, noise=0.1)
        written.append((list(checkpoint.tensors), read(out)))
    (order, first), (other_order, second) = written
    assert order != other_order
    assert all(torch.equal(first[name], second[name]) for name in first)


def reverse_shards(folder: Path) -> None:
    """Renames shards so that they come in another order, and drops the index that knows their names."""
    (folder / "model.safetensors.index.json").unlink()
    for i, path in enumerate(sorted(folder.glob("*.safetensors"), reverse=True)):
        path.rename(folder / f"model-{chr(ord('a') + i)}.safetensors")


def test_shards_stay_under_their_size(tmp_path: Path, dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcycle, "MAX_SHARD_BYTES", 20_000)
    write_mixtral(dense, tmp_path / "out", routers=gates(DENSE, 4), num_experts=4)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 4
    assert max(sizes) < 20_000 + 4_000  # with its header
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    read(tmp_path / "out")


def test_tokenizer_files_come_along(tmp_path: Path, dense: Checkpoint) -> None:
    files = {"tokenizer.json": "1", "tokenizer_config.json": "2", "chat_template.jinja": "3", "other.py": "4"}
    for name, content in files.items():
        (tmp_path / "dense" / name).write_text(content)
    write_mixtral(dense, tmp_path / "out", routers=gates(DENSE, 2), num_experts=2)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*files, "config.json", "generation_config.json", "model.safetensors"} - {"other.py"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "3"


def test_from_a_gguf_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf_with_tokenizer(tmp_path / "x.gguf"))
    write_mixtral(checkpoint, tmp_path / "out", routers=gates(TINY_LLAMA, 2), num_experts=2)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(read(tmp_path / "out")[name], tiny_tensors(TINY_LLAMA)[name].bfloat16())
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_nothing_is_left_when_it_fails(tmp_path: Path, dense: Checkpoint) -> None:
    write_gguf(tmp_path / "x.gguf", TINY_LLAMA, tiny_tensors(TINY_LLAMA))  # has no tokenizer, which comes last
    with pytest.raises(CheckpointError, match="tokenizer model None"):
        write_mixtral(
            open_checkpoint(tmp_path / "x.gguf"), tmp_path / "out", routers=gates(TINY_LLAMA, 2), num_experts=2
        )
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "x.gguf"}
    with pytest.raises(CheckpointError, match="dense: is there already"):
        write_mixtral(dense, tmp_path / "dense", routers=gates(DENSE, 2), num_experts=2)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.gguf/out: (Not a directory|File exists)"):
        write_mixtral(dense, tmp_path / "x.gguf" / "out", routers=gates(DENSE, 2), num_experts=2)


def test_tensors_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path / "dense", TINY_MIXTRAL)
    config = json.loads((tmp_path / "dense" / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="6 tensors missing"):
        write_mixtral(
            open_checkpoint(tmp_path / "dense"), tmp_path / "out", routers=gates(TINY_LLAMA, 2), num_experts=2
        )
    assert not (tmp_path / "out").exists()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T)


def inputs(hidden_size: int, num_tokens: int, *, seed: int) -> Tensor:
    """Rows like a trained model's: one large common mean, and a spectrum that falls over three decades."""
    generator = named_generator(seed, "inputs")
    spectrum = torch.logspace(1, -2, hidden_size, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(hidden_size, hidden_size, generator=generator, dtype=torch.float64)).Q
    mean = 5 * torch.randn(hidden_size, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    result: Tensor = (mean + noise * spectrum) @ directions
    return result


@pytest.mark.parametrize(("hidden_size", "num_experts"), [(64, 8), (37, 5), (12, 3), (64, 100)])
def test_router_rows_avoid_what_tokens_share(hidden_size: int, num_experts: int) -> None:
    x = inputs(hidden_size, 3000, seed=0)
    mean, covariance = moments(x)
    rows = router_rows(mean, covariance, num_experts, seed=7)
    assert rows.shape == (num_experts, hidden_size)
    assert rows.dtype == torch.float32
    values = torch.linalg.eigh(covariance)
    top = values.eigenvectors[:, hidden_size - min(8, hidden_size // 4) :]
    rows = rows.double() / rows.double().norm(dim=1, keepdim=True)
    assert (rows @ mean / mean.norm()).abs().max() < 1e-6
    assert (rows @ top).abs().max() < 1e-6


def test_router_logits_have_unit_deviation_and_spread_tokens() -> None:
    x = inputs(64, 4000, seed=1)
    mean, covariance = moments(x)
    rows = router_rows(mean, covariance, 8, seed=0).double()
    logits = x @ rows.T
    torch.testing.assert_close(logits.std(0), torch.ones(8, dtype=torch.float64), rtol=1e-3, atol=0)

    def imbalance(scores: Tensor) -> float:
        load = scores.topk(2).indices.flatten().bincount(minlength=8).double()
        return float(load.max() / load.mean())

    plain = torch.randn(8, 64, generator=named_generator(0, "plain"), dtype=torch.float64)
    assert imbalance(logits) < 1.25
    assert imbalance(x @ plain.T) > 1.7


def test_router_rows_depend_on_the_seed_alone() -> None:
    mean, covariance = moments(inputs(24, 500, seed=2))
    rows: Sequence[Tensor] = [router_rows(mean, covariance, 4, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])


def test_router_rows_of_inputs_that_do_not_vary() -> None:
    rows = router_rows(torch.ones(16), torch.zeros(16, 16), 4, seed=0)
    assert rows.isfinite().all()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert (rows @ torch.ones(16)).abs().max() < 1e-5


def test_the_calibration_text_is_varied() -> None:
    text = calibration_text()
    assert 8_000 < len(text.encode()) < 12_000
    assert all(part in text for part in ("def merge", "SELECT", "<html", '{"id"', "¿", "ß", "。", "Поезд", "🙂"))
