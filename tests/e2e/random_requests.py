"""Random requests whose answers are hard to stream, and what their answers say, whole or in chunks, in one form."""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MULTIBYTE = ("é", "中文", "🎉", "👩‍👩‍👧", "ß", "😀", "ñ", "漢字", "Ω", "中")
WORDS = ("Once", " upon", " a", " time", "\n", "1, 2, 3", " é", "漢字", "🎉", " the end.", "<b>", "\t", "<|im_end|>")


@dataclass(frozen=True)
class Target:
    """What requests are drawn for."""

    model: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    special: frozenset[str]
    """Names of the control tokens, which have no text unless it is asked for."""
    vocab_size: int
    max_tokens: int


@dataclass(frozen=True)
class RandomRequest:
    path: str
    body: dict[str, Any]
    """Without stop strings: those are cut out of the answer to this."""

    @property
    def skips_special(self) -> bool:
        return self.body.get("skip_special_tokens") is not False

    @property
    def echoed(self) -> str | list[int] | None:
        """The prompt that comes back in front."""
        return self.body["prompt"] if self.body.get("echo") else None


@dataclass
class Said:
    """One choice of an answer."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    """The bytes of each token."""
    logprobs: list[float | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of a completion."""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """After each chunk: characters and tokens so far."""


def draw(rng: random.Random, target: Target) -> RandomRequest:
    """A request for 1 to 3 choices, most with log probabilities, many forced to characters of several bytes or to
    parts of them.
    """
    path = COMPLETIONS if rng.random() < 0.6 else CHAT
    text = "".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
    body: dict[str, Any] = {
        "model": target.model,
        "seed": rng.randrange(2**40),
        "temperature": rng.choice([0, 0.5, 1, 1.5]),
        "max_tokens": rng.randrange(1, target.max_tokens + 1),
        "n": rng.choice([1, 1, 1, 2, 3]),
    }
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": text}]
        body |= rng.choice([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": rng.randrange(4)}])
    else:
        ids = [rng.randrange(target.vocab_size) for _ in range(rng.randrange(1, 12))]
        body["prompt"] = rng.choice([text, ids])
        body |= rng.choice([{}, {"logprobs": 0}, {"logprobs": rng.randrange(6)}, {"logprobs": 1}])
        body |= rng.choice([{}, {}, {"echo": True}])
    forcing = rng.random()
    if forcing < 0.4:
        forced = target.encode("".join(rng.choices(MULTIBYTE, k=3)))
        body["logit_bias"] = {str(token): 100 for token in forced}
    elif forcing < 0.6:
        some = rng.sample(MULTIBYTE, 4)
        body["structured_outputs"] = rng.choice([{"regex": f"({'|'.join(some)})*"}, {"choice": ["".join(some), *some]}])
    for name, value in (
        ("ignore_eos", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("stop_token_ids", [rng.randrange(target.vocab_size) for _ in range(3)]),
        ("min_tokens", rng.randrange(body["max_tokens"] + 1)),
    ):
        if rng.random() < 0.3:
            body[name] = value
    return RandomRequest(path, body)


def draw_stops(rng: random.Random, texts: Sequence[str]) -> list[str]:
    """1 to 4 pieces of `texts`, which a request that is answered with these is cut at; none where they have no text."""
    stops = []
    for _ in range(rng.randrange(1, 5)):
        text = rng.choice(texts)
        start = rng.randrange(len(text) // 4, len(text)) if text else 0
        stops.append(text[start : start + rng.randrange(1, 6)])
    return [stop for stop in dict.fromkeys(stops) if stop]


def cut(text: str, stops: Sequence[str], *, include: bool) -> str:
    """What is left of `text` when the stop string that ends first ends it; of two that end together, the longer."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text
    end, start = min(found)
    return text[: end if include else start]


def read_whole(path: str, answer: dict[str, Any]) -> list[Said]:
    said = [Said() for _ in answer["choices"]]
    for choice in answer["choices"]:
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        _add(said[choice["index"]], path, text, choice)
    return said


def read_chunks(path: str, chunks: Sequence[dict[str, Any]], num_choices: int) -> list[Said]:
    """As the chunks say, which have no text but between the first and the last of a choice."""
    said = [Said() for _ in range(num_choices)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = said[choice["index"]]
            assert one.finish_reason is None, "nothing follows the finish"
            text = choice["delta"].get("content") or "" if path == CHAT else choice["text"]
            introduces = path == CHAT and "role" in choice["delta"]
            assert introduces == (path == CHAT and not one.pieces)
            assert text or introduces or choice["finish_reason"] is not None, "an empty chunk"
            _add(one, path, text, choice)
    return said


def _add(said: Said, path: str, text: str, choice: dict[str, Any]) -> None:
    said.text += text
    said.finish_reason = choice["finish_reason"]
    logprobs = choice["logprobs"]
    if logprobs is not None and path == CHAT:
        for entry in logprobs["content"]:
            said.tokens.append(entry["token"])
            said.logprobs.append(entry["logprob"])
            data = token_bytes(entry["token"])
            assert entry["bytes"] in (list(data), None), entry
            said.data.append(data)
    elif logprobs is not None:
        said.tokens += logprobs["tokens"]
        said.logprobs += logprobs["token_logprobs"]
        said.offsets += logprobs["text_offset"]
        said.data += map(token_bytes, logprobs["tokens"])
    said.pieces.append((len(said.text), len(said.tokens)))


def token_bytes(name: str) -> bytes:
    r"""What a token's name says: `bytes:\xf0\x9f` where it is only a part of a character."""
    if name.startswith(r"bytes:\x"):
        return bytes.fromhex(name.removeprefix("bytes:").replace(r"\x", ""))
    return name.encode()


def starts(data: Sequence[bytes]) -> list[int]:
    """Where in the decoded text each token begins; one that continues a character, where that character begins."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    positions, position = [], 0
    for item in data:
        positions.append(position)
        position += len(decoder.decode(item))
    return positions
