"""Checkpoint folders with small tokenizers of both kinds, and the real Mixtral one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceNormalizer
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

GOLDEN = Path(__file__).parents[2] / "golden"
MIXTRAL = GOLDEN / "mixtral-8x7b"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_TOOLS = """\
{%- if messages[0].role == "system" %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for m in turns %}
    {%- if not (m.role == "tool" or (m.tool_calls is defined and m.tool_calls is not none)) %}
        {%- if (m.role == "user") != (ns.index % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == "user" %}
        {%- if tools is not none and m == asked[-1] %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.function.items() %}
                    {%- if value is string %}{{ '"' + key + '": "' + value + '"' }}
                    {%- else %}{{ '"' + key + '": ' + value | tojson }}{% endif %}
                    {{- ", " if not loop.last }}
                {%- endfor %}
                {{- "}}" + (", " if not loop.last else "") }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST]" + (system + "\n\n" if loop.last and system is defined else "") + m.content + "[/INST]" }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception("9 letters") }}{% endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' + (", " if not loop.last else "]" + eos_token) }}
        {%- endfor %}
    {%- elif m.role == "assistant" %}{{ m.content | trim + eos_token }}
    {%- elif m.role == "tool" %}
        {%- if m.tool_call_id | length != 9 %}{{ raise_exception("9 letters") }}{% endif %}
        {{- '[TOOL_RESULTS]{"content": ' + m.content | string }}
        {{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception("no such role") }}{% endif %}
{%- endfor %}
"""
"""After Mistral 7B Instruct v0.3 and Mixtral 8x22B Instruct."""
MISTRAL_MARKERS = tuple(
    f"[{name}]"
    for name in ("INST", "/INST", "TOOL_CALLS", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_RESULTS", "/TOOL_RESULTS")
)
HERMES_TOOLS = """\
{%- if tools %}
    {{- "<|im_start|>system\n" + (messages[0].content + "\n\n" if messages[0].role == "system" else "") }}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}{{ "\n" }}{{ tool | tojson }}{% endfor %}
    {{- '\n</tools>\nAnswer with\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == "system" %}
    {{- "<|im_start|>system\n" + messages[0].content + "<|im_end|>\n" }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "user" or (m.role == "assistant" and not m.tool_calls) %}
        {{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
    {%- elif m.role == "assistant" %}
        {{- "<|im_start|>assistant" + ("\n" + m.content if m.content else "") }}
        {%- for call in m.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif m.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
        {{- "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""
"""After Hermes 2 Pro and Qwen2.5."""
HERMES_MARKERS = ("<tool_call>", "</tool_call>")
WORDS = ("he", "ll", "hell", "hello", "in", "im", "end", "Ġw", "Ġworld", "ST", "OP", "STOP")


def byte_level(
    folder: Path, *, specials_special: bool = True, added: Mapping[str, bool] | None = None, **config: Any
) -> Path:
    """Byte-level BPE with ids 0-255 for bytes, a few words, then <s>, <|im_start|>, <|im_end|>: under 280 tokens.

    `added`: more tokens, and whether they are special.
    """
    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        left, right = word[:1], word[1:]
        if right not in vocab:
            left, right = word[:2], word[2:]
        if left in vocab and right in vocab:
            merges.append((left, right))
            vocab[word] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>"])
    for text in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_tokens([AddedToken(text, special=specials_special, normalized=False)])
    for text, special in (added or {}).items():
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "<|im_end|>", **config})


def sentencepiece(folder: Path, **config: Any) -> Path:
    """SentencePiece-like BPE with byte fallback: <unk>, <s>, </s>, 256 byte tokens, then pieces."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "c", "<", ">", "/", "s", "▁a", "ab", "s>"):
        vocab[piece] = len(vocab)
    # a vocabulary in which plain text could become the control token by a merge
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[("▁", "a"), ("a", "b"), ("s", ">"), ("<", "s>")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = NormalizerSequence([Prepend("▁"), ReplaceNormalizer(" ", "▁")])
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", **config})


def write_json(folder: Path, **files: Any) -> Path:
    """Writes `name=object` to name.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    return write_json(folder, tokenizer=json.loads(tokenizer.to_str()), tokenizer_config=config)
