"""What is asked: random prompts, random prompts with shared beginnings, or those of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

import msgspec

from server.bench.errors import BenchError

FIRST_ID, LAST_ID = 10, 30_000
"""Random token ids are from here to there, as far as the vocabulary has them, whatever the server: the same seed then
gives the same prompts to every server of a model."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: a text, token ids or the messages of a chat, and how long the answer may be."""

    content: str | tuple[int, ...] | tuple[dict[str, Any], ...]
    max_tokens: int
    num_tokens: int | None = None
    """Of the content, as far as is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """In tokens. `range_ratio` r draws input and output uniformly from length * (1 - r) to length * (1 + r)."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    """Further tokens in front of the input, which every `num_prefixes`-th prompt shares."""
    num_prefixes: int = 1


class Dataset(Protocol):
    """Where prompts come from."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""


@dataclass(frozen=True, slots=True)
class Units:
    """What random prompts are made of: token ids, or words with the number of tokens that each is."""

    items: Sequence[int] | Sequence[str]
    sizes: Sequence[int] | None = None
    """None: one token each."""

    def draw(self, num_tokens: int, random: Random) -> list[int]:
        """Places in `items` of so many tokens together, or of a few more where a word has several."""
        if self.sizes is None:
            return random.choices(range(len(self.items)), k=num_tokens)
        drawn: list[int] = []
        while num_tokens > 0:
            drawn.append(random.randrange(len(self.items)))
            num_tokens -= self.sizes[drawn[-1]]
        return drawn

    def prompt(self, drawn: Sequence[int], max_tokens: int) -> Prompt:
        num_tokens = len(drawn) if self.sizes is None else sum(self.sizes[place] for place in drawn)
        units = [self.items[place] for place in drawn]
        ids = tuple(unit for unit in units if isinstance(unit, int))
        return Prompt(ids if len(ids) == len(units) else " ".join(map(str, units)), max_tokens, num_tokens)


class RandomDataset:
    """Random prompts, the same ones for the same seed."""

    def __init__(self, units: Units, lengths: Lengths, seed: str) -> None:
        self._units = units
        self._lengths = lengths
        self._random = Random(seed)

    def take(self, count: int) -> list[Prompt]:
        """Each call has prefixes of its own, so that no run finds those of another in a cache."""
        lengths, units, random = self._lengths, self._units, self._random
        prefixes = [units.draw(lengths.prefix_len, random) for _ in range(lengths.num_prefixes)]
        prompts = []
        for number in range(count):
            drawn = prefixes[number % len(prefixes)] + units.draw(self._about(lengths.input_len), random)
            prompts.append(units.prompt(drawn, self._about(lengths.output_len)))
        return prompts

    def _about(self, length: int) -> int:
        ratio = self._lengths.range_ratio
        return max(1, self._random.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


class FileDataset:
    """The prompts of a JSONL file in order, from the start again after the last.

    A line is an object with a `prompt` (a text, or token ids for completions) or, for chats, `messages`, and perhaps
    `max_tokens`. Raises BenchError when the file cannot be read or a line is something else.
    """

    def __init__(self, path: Path, *, chat: bool, output_len: int) -> None:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror}") from None
        self._prompts = [
            _prompt(line, f"{path} line {number}", chat, output_len)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not self._prompts:
            raise BenchError(f"{path} has no prompts")
        self._next: Iterator[Prompt] = cycle(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        return list(islice(self._next, count))


class _Line(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


def _prompt(line: bytes, where: str, chat: bool, output_len: int) -> Prompt:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{where}: {error}") from None
    max_tokens = output_len if read.max_tokens is None else read.max_tokens
    if max_tokens < 1:
        raise BenchError(f"{where}: max_tokens must be 1 or more")
    if read.messages and not read.prompt:
        if not chat:
            raise BenchError(f"{where}: messages need --endpoint chat")
        return Prompt(tuple(read.messages), max_tokens)
    if isinstance(read.prompt, str) and read.prompt:
        return Prompt(read.prompt, max_tokens)
    if isinstance(read.prompt, list) and read.prompt:
        if chat:
            raise BenchError(f"{where}: token ids need --endpoint completions")
        return Prompt(tuple(read.prompt), max_tokens, len(read.prompt))
    raise BenchError(f"{where} has neither a prompt nor messages")
