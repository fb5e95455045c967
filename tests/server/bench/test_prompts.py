"""Random prompts and those of a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.bench.errors import BenchError
from server.bench.prompts import FileDataset, Lengths, Prompt, RandomDataset, Units

IDS = Units(range(10, 300))
WORDS = Units(("one", "two", "extraordinary"), (1, 1, 3))


def lengths(input_len: int = 12, output_len: int = 7, **more: Any) -> Lengths:
    return Lengths(input_len=input_len, output_len=output_len, **more)


def test_random_ids() -> None:
    prompts = RandomDataset(IDS, lengths(), "0").take(100)
    assert all(len(prompt.content) == prompt.num_tokens == 12 and prompt.max_tokens == 7 for prompt in prompts)
    counts = Counter(token for prompt in prompts for token in prompt.content)
    assert all(isinstance(token, int) and 10 <= token < 300 for token in counts)
    assert len(counts) > 250, "all of the vocabulary is used"
    assert len({prompt.content for prompt in prompts}) == 100


def test_the_seed_alone_decides() -> None:
    def take(seed: str) -> list[Prompt]:
        dataset = RandomDataset(IDS, lengths(range_ratio=0.5), seed)
        return dataset.take(5) + dataset.take(5)

    assert take("0") == take("0")
    assert not {prompt.content for prompt in take("0")} & {prompt.content for prompt in take("1")}
    assert len({prompt.content for prompt in take("0")}) == 10, "the second run has prompts of its own"


def test_range_ratio() -> None:
    prompts = RandomDataset(IDS, lengths(100, 50, range_ratio=0.2), "0").take(500)
    assert {prompt.num_tokens for prompt in prompts} == {*range(80, 121)}
    assert {prompt.max_tokens for prompt in prompts} == {*range(40, 61)}
    shortest = RandomDataset(IDS, lengths(1, 1, range_ratio=1), "0").take(50)
    assert {prompt.num_tokens for prompt in shortest} == {1, 2}, "none is empty"


@pytest.mark.parametrize("num_prefixes", [1, 3])
def test_shared_prefixes(num_prefixes: int) -> None:
    dataset = RandomDataset(IDS, lengths(4, prefix_len=8, num_prefixes=num_prefixes), "0")
    first, second = dataset.take(6), dataset.take(6)
    for prompts in (first, second):
        assert all(prompt.num_tokens == len(prompt.content) == 12 for prompt in prompts)
        beginnings = [prompt.content[:8] for prompt in prompts]
        assert len(set(beginnings)) == num_prefixes
        assert beginnings[:num_prefixes] * (6 // num_prefixes) == beginnings, "in turn"
        assert len({prompt.content[8:] for prompt in prompts}) == 6
    assert not {p.content[:8] for p in first} & {p.content[:8] for p in second}, "each run has its own"


def test_words_are_counted_in_tokens() -> None:
    for prompt in RandomDataset(WORDS, lengths(10), "0").take(50):
        assert isinstance(prompt.content, str)
        sizes = {"one": 1, "two": 1, "extraordinary": 3}
        assert prompt.num_tokens == sum(sizes[word] for word in prompt.content.split(" "))
        assert 10 <= prompt.num_tokens <= 12
    (unknown,) = RandomDataset(Units(("one", "two")), lengths(10), "0").take(1)
    assert isinstance(unknown.content, str)
    assert len(unknown.content.split(" ")) == unknown.num_tokens == 10


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "Hi é"}, "", {"prompt": [5, 6], "max_tokens": 3, "other": 1})
    dataset = FileDataset(file, chat=False, output_len=9)
    assert len(dataset) == 2
    first, second = Prompt("Hi é", 9), Prompt((5, 6), 3, 2)
    assert dataset.take(3) == [first, second, first], "from the start again"
    assert dataset.take(1) == [second], "each run goes on where the last one stopped"


def test_a_file_of_chats(tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}]},
    ]
    file = write(tmp_path / "x.jsonl", {"messages": messages}, {"prompt": "Hi"})
    assert FileDataset(file, chat=True, output_len=9).take(2) == [Prompt(tuple(messages), 9), Prompt("Hi", 9)]


@pytest.mark.parametrize(
    ("line", "chat", "message"),
    [
        ("{", False, "line 2: "),
        ("[]", False, "line 2: Expected `object`, got `array`"),
        ({"prompt": 5}, False, "line 2: "),
        ({"prompt": ""}, False, "line 2 has neither a prompt nor messages"),
        ({"prompt": []}, False, "line 2 has neither a prompt nor messages"),
        ({"text": "x"}, True, "line 2 has neither a prompt nor messages"),
        ({"prompt": "x", "max_tokens": 0}, False, "line 2: max_tokens must be 1 or more"),
        ({"messages": [{"role": "user", "content": "x"}]}, False, "line 2: messages need --endpoint chat"),
        ({"prompt": [5]}, True, "line 2: token ids need --endpoint completions"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, chat: bool, message: str) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(BenchError) as error:
        FileDataset(file, chat=chat, output_len=9)
    assert str(error.value).startswith(f"{file} {message}")


def test_a_file_without_prompts_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="has no prompts"):
        FileDataset(write(tmp_path / "x.jsonl", "", ""), chat=False, output_len=9)
    with pytest.raises(BenchError, match="No such file"):
        FileDataset(tmp_path / "no.jsonl", chat=False, output_len=9)
