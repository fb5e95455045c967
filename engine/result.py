"""StepResult: what a step computed, free of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.types import TokenLogprobs, TokenRouting


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token, with its raw log probabilities when they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """All entries are keyed by a chunk's index in the plan."""

    sampled: dict[int, Sampled]
    """One for each chunk that samples."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """For each chunk whose request scores its prompt: the prompt tokens that follow the chunk's tokens."""
    routing: dict[int, list[TokenRouting]] = field(default_factory=dict)
    """For each chunk whose request traces: of every token of the chunk, or of its last one alone when the prompt is
    not traced."""
    expert_visits: dict[int, int] = field(default_factory=dict)
    """For each chunk of a steered request: experts that computed, over its tokens and all layers."""
    failed: dict[int, str] = field(default_factory=dict)
    """Instead of a sampled token: why there is none. Only that request is affected."""
