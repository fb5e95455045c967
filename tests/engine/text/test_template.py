from datetime import datetime
from typing import Any

import pytest

from engine.text import TemplateError
from engine.text import template as template_module
from engine.text.template import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source: str, *messages: dict[str, Any], prompt: bool = True, **variables: str) -> str:
    return ChatTemplate(source, variables).render(messages, add_generation_prompt=prompt)


def fails(source: str, match: str, *messages: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match=match) as caught:
        render(source, *messages)
    assert "\n" not in str(caught.value)


def test_blocks_take_their_line_with_them() -> None:
    source = "a\n  {% for m in messages %}\n- {{ m.content }}\n  {% endfor %}\nb\n"
    assert render(source, USER, USER) == "a\n- hi\n- hi\nb"


def test_variables() -> None:
    source = "{{ bos_token }}|{{ add_generation_prompt }}|{{ tools }}|{{ documents is none }}|{{ eos_token }}|"
    assert render(source, bos_token="<s>") == "<s>|True|None|True||"
    assert render("{{ add_generation_prompt }}", prompt=False) == "False"


def test_loop_controls() -> None:
    source = "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    assert render(source, USER, USER, USER, USER) == "hihi"


def test_generation_blocks_are_their_contents() -> None:
    source = "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}.{% endgeneration %}{% endfor %}"
    assert render(source, USER, USER) == "hi.hi."


def test_tojson_escapes_nothing_for_html() -> None:
    message = {"role": "user", "content": {"b": "<é'&>", "a": [1, None]}}
    assert render("{{ messages[0].content | tojson }}", message) == '{"b": "<é\'&>", "a": [1, null]}'
    source = "{{ messages[0].content | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}"
    assert render(source, message).replace("\n", "") == '{ "a": [  1,  null ], "b": "<\\u00e9\'&>"}'


def test_strftime_now() -> None:
    years = {datetime.now().year, int(render("{{ strftime_now('%Y') }}")), datetime.now().year}
    assert max(years) - min(years) <= 1


def test_a_refusal_is_the_templates_own_words() -> None:
    fails("{{ raise_exception('roles must\nalternate') }}", r"^roles must alternate$")
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('x' * 10000) }}")
    assert len(str(caught.value)) == 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.x.y }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent=[]) }}",
        "{{ messages[0].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ range(10 ** 30) }}",
    ],
)
def test_whatever_goes_wrong_is_a_template_error(source: str) -> None:
    fails(source, r"^the chat template failed: \S", USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ range.__closure__[0].cell_contents }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError, match=r"failed: .*(unsafe|undefined)"):
        ChatTemplate(source, {}).render([dict(USER)], add_generation_prompt=True)


@pytest.mark.parametrize(
    "bomb",
    [
        "{% set x = 'a' * 1000000000 %}",
        "{% set x = 1000000000 * 'a' %}",
        "{% set x = [0] * 1000000000 %}",
        "{% set x = 9 ** (9 ** 9) %}",
        "{% set x = '%800000000d' % 1 %}",
        "{% set x = '%*d' % (800000000, 1) %}",
        "{% set x = '%800000000d' | format(1) %}",
    ],
)
def test_small_things_do_not_become_huge(bomb: str) -> None:
    fails(bomb, "too large|more than")


def test_ordinary_arithmetic_and_formatting_work() -> None:
    source = "{{ 3 * 4 }} {{ 2 ** 10 }} {{ 2 ** 0.5 > 1.4 }} {{ 'ab' * 3 }} {{ 7 % 4 }} {{ '%05.1f|%s' % (2.5, 'x') }} "
    assert render(source + "{{ '%s-%d' | format('a', 3) }}") == "12 1024 True ababab 3 002.5|x a-3"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_OUTPUT_CHARS", 20)
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", *[USER] * 10) == "hi" * 10
    fails("{% for m in messages %}{{ m.content }}{% endfor %}", "wrote more than 20 characters", *[USER] * 11)


def test_loops_are_bounded_together() -> None:
    assert render("{% for i in range(2, 8, 3) %}{{ i }}{% endfor %}") == "25"
    nested = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    fails(nested, "loops over more than 1,000,000 numbers")
    inside_a_macro = "{% macro f() %}{% for i in range(99999999) %}{% endfor %}{% endmacro %}{{ f() }}"
    fails(inside_a_macro, "loops over more than 1,000,000 numbers")


def test_each_rendering_has_its_own_bound() -> None:
    template = ChatTemplate("{% for i in range(600000) %}{% endfor %}x", {})
    for _ in range(2):
        assert template.render([], add_generation_prompt=True) == "x"


@pytest.mark.parametrize(
    "source", ["{{", "{% for %}", "{% endfor %}", "{{ x | nofilter }}", "{% unknown %}", "{{ 'a }}"]
)
def test_what_is_not_a_template(source: str) -> None:
    with pytest.raises(TemplateError, match=r"^line 2: \S"):
        ChatTemplate("\n" + source, {})
