"""generation_config.json: what is taken from it, and what is left."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from server.config import SamplingDefaults
from server.generation_config import chosen_defaults, sampling_defaults
from weights.errors import CheckpointError


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_checkpoints_wishes(tmp_path: Path) -> None:
    wishes: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.02}
    found = sampling_defaults(write(tmp_path, wishes | {"do_sample": True, "eos_token_id": [1, 2]}))
    assert found == SamplingDefaults(**wishes)
    assert sampling_defaults(write(tmp_path, {"temperature": None, "top_k": 5})) == SamplingDefaults(top_k=5)


def test_a_checkpoint_without_wishes(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert sampling_defaults(file) == SamplingDefaults()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", 3), ("temperature", True), ("temperature", "1"), ("top_p", 0), ("top_k", 1.5),
     ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", [1])],
)  # fmt: skip
def test_a_wrong_wish_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any) -> None:
    other = "top_p" if name == "top_k" else "top_k"
    with caplog.at_level(logging.WARNING):
        found = sampling_defaults(write(tmp_path, {name: value, other: 1}))
    assert found == SamplingDefaults(**{other: 1})
    assert name in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"temperature": NaN}', b"\xff", b'{"a":' * 10_000])
def test_a_malformed_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults(tmp_path) == SamplingDefaults()
    assert "generation_config.json" in caplog.text


def test_wishes_are_defaults_and_no_more(tmp_path: Path) -> None:
    from server.protocol.completion import CompletionRequest

    defaults = sampling_defaults(write(tmp_path, {"temperature": 0.5, "top_k": 9}))
    plain = CompletionRequest.model_validate({"prompt": "x"}).to_params(defaults, max_tokens=1, logprobs=None)
    assert (plain.temperature, plain.top_k) == (0.5, 9)
    own = {"prompt": "x", "temperature": 0, "top_k": -1}
    params = CompletionRequest.model_validate(own).to_params(defaults, max_tokens=1, logprobs=None)
    assert (params.temperature, params.top_k) == (0, -1)


@pytest.mark.parametrize(("do_sample", "temperature"), [(False, 0), (True, 0.7), (None, 0.7), (0, 0.7)])
def test_a_checkpoint_that_does_not_sample_is_greedy(do_sample: object, temperature: float, tmp_path: Path) -> None:
    assert sampling_defaults(write(tmp_path, {"temperature": 0.7, "do_sample": do_sample})).temperature == temperature


def test_whose_defaults(tmp_path: Path) -> None:
    checkpoint, other, empty = (tmp_path / name for name in ("checkpoint", "other", "empty"))
    for folder in (checkpoint, other, empty):
        folder.mkdir()
    write(checkpoint, {"temperature": 0.5})
    write(other, {"top_k": 9})
    assert chosen_defaults("auto", checkpoint) == SamplingDefaults(temperature=0.5)
    assert chosen_defaults("auto", empty) == SamplingDefaults()
    assert chosen_defaults("vllm", checkpoint) == SamplingDefaults()
    assert chosen_defaults(str(other), checkpoint) == SamplingDefaults(top_k=9)
    for wrong in (str(empty), str(tmp_path / "no"), str(other / "generation_config.json"), ""):
        with pytest.raises(CheckpointError, match=r"no generation_config\.json") as caught:
            chosen_defaults(wrong, checkpoint)
        assert "\n" not in str(caught.value)
