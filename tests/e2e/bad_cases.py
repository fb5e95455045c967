"""Rows H1, H2 and H6 to H15 of the table of bad inputs as data: what is sent, and what the answer must be.

The server they are for has the tiny model under the name `tiny`, with a chat template that wants user and assistant in
turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.tiny_tokenizer import VOCAB_SIZE

MODEL = "tiny"
CONTEXT = 2048
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, beginning with the user') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    row: str
    what: str
    path: str
    body: bytes
    method: str = "POST"
    status: int = 400
    param: str | None = None
    code: str | None = None
    in_message: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.row} {self.path} {self.what}"


def _deep(opening: str, closing: str, count: int) -> str:
    return opening * count + closing * count


_GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "Hi", "max_tokens": 5},
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
    TOKENIZE: {"model": MODEL, "prompt": "Hi"},
    DETOKENIZE: {"model": MODEL, "tokens": [72, 105]},
}

_H1: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "words": b"hello",
    "cut off": b'{"prompt": "Hi"',
    "trailing comma": b'{"prompt": "Hi",}',
    "single quotes": b"{'prompt': 'Hi'}",
    "two values": b'{"prompt": "Hi"} {}',
    "a comment": b'{"prompt": "Hi"} // please',
    "a list": b"[]",
    "a list of requests": b'[{"prompt": "Hi"}]',
    "a string": b'"Hi"',
    "null": b"null",
    "a number": b"1",
    "true": b"true",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "overlong UTF-8": b'{"prompt": "\xc0\x80"}',
    "UTF-8 cut short": b'{"prompt": "\xf0\x9f"}',
    "UTF-16": '{"prompt": "Hi"}'.encode("utf-16"),
    "null bytes": b"\x00" * 100,
}
# The value of one field of an otherwise good body, as JSON text: what it says, and the field that must be named, if so.
_H2: dict[str, tuple[str, str, str | None]] = {
    "1,000 lists deep": ("user", _deep("[", "]", 1000), None),
    "1,000 objects deep": ("user", _deep('{"a":', "}", 1000).replace(":}", ":1}"), None),
    "60,000 lists deep": ("user", _deep("[", "]", 60_000), None),
    "60,000 objects deep": ("metadata", _deep('{"a":', "}", 60_000).replace(":}", ":1}"), None),
    "60,000 lists left open": ("user", "[" * 60_000, None),
    "an integer of 5,000 digits": ("seed", "1" * 5000, None),
    "a negative one": ("max_tokens", "-" + "9" * 5000, None),
    "one in a field without effect": ("user", "1" * 5000, None),
    "NaN": ("temperature", "NaN", "temperature"),
    "Infinity": ("top_p", "Infinity", "top_p"),
    "-Infinity": ("presence_penalty", "-Infinity", "presence_penalty"),
    "1e400": ("temperature", "1e400", "temperature"),
    "-1e400 inside": ("logit_bias", '{"1": -1E+400}', "logit_bias"),
    "1e400 in a field without effect": ("metadata", '{"a": [1e400]}', "metadata"),
    "400 digits and a point": ("temperature", "9" * 400 + ".0", "temperature"),
}
_H6_ROUTES = ("/nothing", "/v1", "/v1/", "/v1/nothing", "/v1/completions/", "/V1/models", "/health/x", "/v1/embeddings")
_H6_METHODS = (
    *(("GET", COMPLETIONS), ("DELETE", CHAT), ("PUT", COMPLETIONS), ("PATCH", CHAT), ("POST", "/v1/models")),
    *(("POST", "/metrics"), ("POST", "/"), ("PUT", "/health"), ("GET", "/v1/experts/reset"), ("OPTIONS", COMPLETIONS)),
    *(("GET", "/tokenize"), ("GET", "/detokenize")),
)
_H7 = ("other", "../../x", "../../../../etc/passwd", "/etc/passwd", "", "TINY", "tiny ", "tiny\u0000", "x" * 10_000)
_MISSING: Any = object()
_H8: dict[str, Any] = {
    "missing": _MISSING,
    "null": None,
    '""': "",
    "[]": [],
    "[[]]": [[]],
    '[1, "a"]': [1, "a"],
    '["a", 1]': ["a", 1],
    "[true]": [True],
    "[1.5]": [1.5],
    "[1.0]": [1.0],
    '[""]': [""],
    '["a", ""]': ["a", ""],
    "[[1], []]": [[1], []],
    "[[1], 2]": [[1], 2],
    "[[[1]]]": [[[1]]],
    "[null]": [None],
    "a number": 5,
    "an object": {"text": "Hi"},
}
_NO_TOKENS: dict[str, Any] = {
    "missing": _MISSING,
    "null": None,
    "text": "5",
    "[true]": [True],
    "[1.5]": [1.5],
    "[[1]]": [[1]],
}
_H9: dict[str, Any] = {
    "-1": [-1],
    "the vocabulary's size": [VOCAB_SIZE],
    "2^63": [2**63],
    "2^63 - 1": [2**63 - 1],
    "-2^63": [-(2**63)],
    "2^64": [5, 2**64],
    "in the second prompt": [[5], [VOCAB_SIZE]],
    "the last of many": [5] * 1000 + [VOCAB_SIZE],
}
_H12: dict[str, list[Any]] = {
    "max_tokens": [-1, 10**18, 1e18, "5", 0, 1.5, True],
    "n": [0, 10**9, -1, "2", 129],
    "top_p": [0, 1.1, -0.1, "1"],
    "top_k": [-5, -2, 0.5],
    "min_p": [-0.1, 1.1],
    "temperature": [-1, 2.1, "1"],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": [2.1, -2.1],
    "repetition_penalty": [0, -1, 2.1],
    "seed": [2**64, 2**63, -(2**63) - 1, 1.5],
    "min_tokens": [-1, 10**18, 6],
    "priority": [2**63, 1.5],
}
_H12_COMPLETIONS: dict[str, list[Any]] = {"logprobs": [-1, 10**9, 21, True], "best_of": [0, 10**9, 129]}
_H12_CHAT: dict[str, list[Any]] = {
    "max_completion_tokens": [-1, 0, 10**18, "5"],
    "logprobs": [-1, 5],
    "top_logprobs": [-1, 10**9, 21, 5],
}
_H13: dict[str, list[Any]] = {
    "logit_bias": [
        *({"x": 1}, {"": 1}, {"1.0": 1}, {"-1": 1}, {str(VOCAB_SIZE): 1}, {"1": 101}, {"1": -101}, {"1": "1"}, [1]),
        {str(token): 1 for token in range(301)},
    ],
    "stop": [5, "", [""], ["a", ""], ["a"] * 5, "x" * 10_000, ["x" * 10_000], [5], {}],
    "stop_token_ids": [[VOCAB_SIZE], [-1], [2**63], ["1"], 5],
}
_H14: dict[str, dict[str, Any]] = {
    "stream_options": {"stream_options": {"include_usage": True}},
    "stream_options, stream false": {"stream_options": {}, "stream": False},
    "chat_template": {"chat_template": "{{ messages }}"},
}
_USER = {"role": "user", "content": "Hi"}
_ASSISTANT = {"role": "assistant", "content": "Hi"}
_H15: dict[str, Any] = {
    "the same role twice": [_USER, _USER],
    "the assistant first": [_ASSISTANT],
    "a system message": [{"role": "system", "content": "Hi"}, _USER],
    "a tool's answer to nothing": [{"role": "tool", "content": "Hi", "tool_call_id": "1"}],
    "an unknown role": [{"role": "wizard", "content": "Hi"}],
    "no role": [{"content": "Hi"}],
    "none": [],
    "missing": _MISSING,
    "a string": "Hi",
    "content of a number": [{"role": "user", "content": 5}],
    "no content": [{"role": "user"}],
}


def _with(path: str, **fields: Any) -> bytes:
    """A good body with other fields; one that is _MISSING is left out."""
    body = {name: value for name, value in (_GOOD[path] | fields).items() if value is not _MISSING}
    return json.dumps(body).encode()


GOOD = _with(COMPLETIONS)


def _with_text(path: str, name: str, value: str) -> bytes:
    """A good body with one more field, given as JSON text."""
    body = {key: item for key, item in _GOOD[path].items() if key != name}
    return f"{json.dumps(body)[:-1]}, {json.dumps(name)}: {value}}}".encode()


def _bodies() -> Iterator[Case]:
    for path in _GOOD:
        for what, body in _H1.items():
            yield Case(row="H1", what=what, path=path, body=body)
        for what, (name, value, param) in _H2.items():
            yield Case(row="H2", what=what, path=path, body=_with_text(path, name, value), param=param)


def _routes() -> Iterator[Case]:
    for route in _H6_ROUTES:
        yield Case(row="H6", what="", path=route, body=_with(COMPLETIONS), status=404)
    for method, route in _H6_METHODS:
        yield Case(row="H6", what=method, method=method, path=route, body=b"", status=405)
    for path in _GOOD:
        for model in _H7:
            body = _with(path, model=model)
            yield Case(
                row="H7", what=model[:30], path=path, body=body, status=404, param="model", code="model_not_found"
            )


def _prompts() -> Iterator[Case]:
    for row, prompts in (("H8", _H8), ("H9", _H9)):
        for what, prompt in prompts.items():
            body = _with(COMPLETIONS, prompt=prompt)
            yield Case(row=row, what=what, path=COMPLETIONS, body=body, param="prompt", in_message=("prompt",))
    for what, tokens in (_NO_TOKENS | _H9).items():
        body = _with(DETOKENIZE, tokens=tokens)
        yield Case(row="H9", what=what, path=DETOKENIZE, body=body, param="tokens", in_message=("tokens",))
    for surrogate in (r'"a\ud800b"', r'"\udc00\ud800"', r'["ok", "\ud83d"]'):
        yield Case(row="H10", what=surrogate, path=COMPLETIONS, body=_with_text(COMPLETIONS, "prompt", surrogate))
        yield Case(row="H10", what=f"stop {surrogate}", path=CHAT, body=_with_text(CHAT, "stop", surrogate))
    yield Case(row="H10", what="U+D800", path=TOKENIZE, body=_with_text(TOKENIZE, "prompt", r'"\ud800"'))
    messages = r'[{"role": "user", "content": "\udfff"}]'
    yield Case(row="H10", what="in a message", path=CHAT, body=_with_text(CHAT, "messages", messages))
    long: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
        "a prompt as long as the context": ({"prompt": [5] * CONTEXT}, "prompt", (CONTEXT,)),
        "a longer prompt": ({"prompt": [5] * (CONTEXT + 1)}, "prompt", (CONTEXT, CONTEXT + 1)),
        "a longer text": ({"prompt": "x" * 5000}, "prompt", (CONTEXT, 5000)),
        "with max_tokens": ({"prompt": [5] * 2000, "max_tokens": 49}, "max_tokens", (CONTEXT, 2000, 49)),
        "max_tokens alone": ({"prompt": [5], "max_tokens": 10**6}, "max_tokens", (CONTEXT, 10**6)),
        "the second prompt": ({"prompt": [[5], [5] * 3000]}, "prompt", (CONTEXT, 3000)),
    }
    for what, (fields, param, counts) in long.items():
        yield Case(
            row="H11",
            what=what,
            path=COMPLETIONS,
            body=_with(COMPLETIONS, **fields),
            param=param,
            code="context_length_exceeded",
            in_message=tuple(map(str, counts)),
        )


def _parameters() -> Iterator[Case]:
    tables = (
        ("H12", COMPLETIONS, _H12 | _H12_COMPLETIONS),
        ("H12", CHAT, _H12 | _H12_CHAT),
        ("H13", COMPLETIONS, _H13),
        ("H13", CHAT, _H13),
    )
    for row, path, table in tables:
        for name, values in table.items():
            for value in values:
                fields = {name: value}
                if name == "top_logprobs" and value != 5:
                    fields["logprobs"] = True
                what = f"{name}={json.dumps(value)[:24]}"
                yield Case(row=row, what=what, path=path, body=_with(path, **fields), param=name, in_message=(name,))
    yield Case(
        row="H12", what="best_of < n", path=COMPLETIONS, body=_with(COMPLETIONS, n=3, best_of=2), param="best_of"
    )
    many = _with(COMPLETIONS, prompt=["a"] * 65, n=2)
    yield Case(row="H12", what="65 prompts times 2", path=COMPLETIONS, body=many, param="n")


def _chats() -> Iterator[Case]:
    for path in (COMPLETIONS, CHAT):
        for what, fields in _H14.items():
            body = _with(path, **fields)
            yield Case(row="H14", what=what, path=path, body=body, param=next(iter(fields)))
    for what, messages in _H15.items():
        yield Case(row="H15", what=what, path=CHAT, body=_with(CHAT, messages=messages), param="messages")
    yield Case(
        row="H15",
        what="10,000 messages",
        path=CHAT,
        body=_with(CHAT, messages=[_USER, _ASSISTANT] * 5000),
        param="messages",
        code="context_length_exceeded",
        in_message=(str(CONTEXT),),
    )


def streamed(case: Case) -> Case | None:
    """The same case with `stream: true`, where its body is an object to add that to."""
    if (
        case.path not in (COMPLETIONS, CHAT)
        or case.method != "POST"
        or not case.body.startswith(b'{"model"')
        or case.row == "H14"
    ):
        return None
    return Case(**(vars(case) | {"what": f"{case.what}, streamed", "body": b'{"stream": true, ' + case.body[1:]}))


PLAIN = [*_bodies(), *_routes(), *_prompts(), *_parameters(), *_chats()]
CASES = [*PLAIN, *(case for case in map(streamed, PLAIN) if case is not None)]
