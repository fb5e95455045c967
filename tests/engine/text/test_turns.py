import pytest

from engine.text.template import ChatTemplate
from engine.text.turns import TurnTokens, turn_tokens
from tests.engine.text.checkpoints import CHATML

ADDED = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "</s>", "<|assistant|>", ""]


@pytest.mark.parametrize(
    ("source", "start", "end"),
    [
        (CHATML, {"<|im_start|>"}, {"<|im_end|>"}),
        ("{% for m in messages %}{{ m.content }}\n </s>{% endfor %}", set(), {"</s>"}),
        ("{% for m in messages %}{{ m.content }}<|im_end|>x{% endfor %}", set(), {"<|im_end|>x"}),
        ("{% for m in messages %}{{ m.content }}, </s>{% endfor %}", set(), set()),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|></s>{% endif %}",
            {"<|assistant|>"},
            set(),
        ),
        ("{{ messages[0].content }}</s>", set(), set()),
        ("{{ raise_exception('no') }}", set(), set()),
        ("constant</s>", set(), set()),
        ("", set(), set()),
    ],
)
def test_turn_tokens(source: str, start: set[str], end: set[str]) -> None:
    found = turn_tokens(ChatTemplate(source, {}), ADDED)
    assert found == TurnTokens(start=frozenset(start), end=frozenset(end))


def test_a_tokenizer_without_added_tokens() -> None:
    assert turn_tokens(ChatTemplate(CHATML, {}), []) == TurnTokens()
