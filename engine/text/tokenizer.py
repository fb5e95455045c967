"""Tokenizer: text and chats to token ids and back, from the files of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers

from engine.errors import ConfigurationError
from engine.text.detokenizer import Detokenizer
from engine.text.errors import TemplateError
from engine.text.files import TokenizerFiles, read_files
from engine.text.guard import ControlGuard
from engine.text.template import ChatTemplate
from engine.text.tools import MARKERS, ToolFormat, ToolSupport, check_calls
from engine.text.turns import turn_tokens
from engine.text.vocabulary import Vocabulary
from weights.errors import CheckpointError

_ROLE = re.compile(r"[\w.-]+")


class Tokenizer:
    """One model's tokenizer and chat template; immutable, and safe to use from several threads.

    `vocabulary` holds the bytes of each id. `eos_token_ids` is the union of tokenizer_config.json's eos_token,
    generation_config.json's and config.json's eos_token_id, and the token with which the chat template ends an
    assistant's turn, as far as the vocabulary has them.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._tokenizer = _build(files)
        self.vocabulary = _vocabulary(files, self._tokenizer)
        self._bos_id = self._named_id(files, "bos_token")
        self._add_bos = files.add_bos_token
        if self._add_bos and self._bos_id is None:
            raise CheckpointError("tokenizer_config.json: add_bos_token is true, but there is no bos_token")
        eos_id = self._named_id(files, "eos_token")
        eos_ids = set(files.eos_token_ids) | ({eos_id} if eos_id is not None else set())
        self._added = {
            token.content: token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        self._template: ChatTemplate | None = None
        if files.chat_template is not None:
            self._template = _compile(files.chat_template, files.special_tokens)
            self._tool_template = self._template
            if files.tool_template is not None:
                self._tool_template = _compile(files.tool_template, files.special_tokens)
            self._plain = ToolSupport.of(self._template, with_tools=False)
            self._with_tools = ToolSupport.of(self._tool_template, with_tools=True)
            turn = turn_tokens(self._template, self._added)
            eos_ids |= {self._added[text] for text in turn.end}
            marks = turn.start | turn.end | (MARKERS if self.describes_tools else frozenset())
            controls = {
                text: token_id for text, token_id in self._added.items() if self.is_special(token_id) or text in marks
            }
            self._guard = ControlGuard(self._tokenizer, controls)
        self.eos_token_ids = frozenset(eos_ids & self.vocabulary.pieces.keys())

    @classmethod
    def load(cls, path: Path, *, chat_template: str | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder or a .gguf file.

        `chat_template` replaces the checkpoint's own: a Jinja template, or the path of a file with one. Raises
        CheckpointError when a file is missing or malformed.
        """
        if path.suffix == ".gguf":
            from weights.gguf_tokenizer import write_tokenizer

            with TemporaryDirectory(prefix="mixserve-tokenizer-") as folder:
                write_tokenizer(path, Path(folder))
                return cls(read_files(Path(folder), chat_template=chat_template))
        return cls(read_files(path, chat_template=chat_template))

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return self.vocabulary.size

    def check_fits(self, vocab_size: int) -> None:
        """Raise ConfigurationError unless every id is one of a model's `vocab_size` tokens."""
        if self.vocab_size > vocab_size:
            raise ConfigurationError(
                f"the tokenizer has ids to {self.vocab_size - 1}, but the model's vocabulary has {vocab_size} tokens; "
                f"use the model's own"
            )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens written in it are control: who sends a raw prompt writes the control too.

        `add_special_tokens` adds what the tokenizer puts around a text: a beginning-of-sequence token as add_bos_token
        in tokenizer_config.json says or, where that is silent, what the post-processor of tokenizer.json adds. Raises
        ValueError for a lone surrogate, which is no text.
        """
        _check_text(text)
        if self._add_bos is None:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self._add_bos and self._bos_id is not None:
            return [self._bos_id, *ids]
        return ids

    @property
    def describes_tools(self) -> bool:
        """Whether the chat template has a place for tools; where it has none, words of ours describe them."""
        return self._template is not None and self._with_tools.tools

    @property
    def tool_format(self) -> ToolFormat:
        """How the model was taught to write calls, by its template; Hermes where that says nothing."""
        return "mistral" if self.describes_tools and "[TOOL_CALLS]" in self._tool_template.source else "hermes"

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a chat by the template, which also writes the beginning-of-sequence token.

        A message is {"role": …, "content": …} and whatever else the template reads. engine/text/tools.py tells the form
        of tools, calls and their answers, and what becomes of them where the template has no place for them. Control
        tokens in anything but the template itself are encoded as ordinary text (engine/text/guard.py says how, and what
        that leaves open). Raises TemplateError, and ValueError for a lone surrogate.
        """
        if self._template is None:
            raise TemplateError("this model has no chat template; give one with --chat-template (chat_template)")
        for index, message in enumerate(messages):
            role = message.get("role")
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise TemplateError(f"messages[{index}]: role must be a word such as user or assistant")
            check_calls(message, f"messages[{index}]")
        template, support = (self._tool_template, self._with_tools) if tools else (self._template, self._plain)
        try:
            disguised, hidden_tools, disguise = self._guard.disguise(*support.prepare(messages, tools))
        except RecursionError:
            raise TemplateError("the messages are nested too deeply") from None
        try:
            rendered = template.render(disguised, tools=hidden_tools, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise TemplateError(disguise.lift(str(error))) from error
        _check_text(rendered)
        if disguise.is_empty:
            return self._tokenizer.encode(rendered, add_special_tokens=False).ids
        return self._guard.encode(rendered, disguise)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids. Bytes that are not UTF-8 are U+FFFD; ids without a token have no text.

        A SentencePiece-like decoder drops the one space that encoding puts in front, so decode(encode(text)) is text.
        """
        detokenizer = Detokenizer(self.vocabulary, skip_special_tokens=skip_special_tokens, drop_leading_space=True)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """The vocabulary's own bytes of a token: a space for "▁" or "Ġ", one byte for a byte token.

        None for an id that has no token, as in the padding of an embedding.
        """
        return self.vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The token alone as text; bytes that are only a part of a character are U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it, such as "▁Hi" or "<0x0A>"; nothing for an id that has no token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is control, left out of a text by `skip_special_tokens`."""
        return token_id in self.vocabulary.special_ids

    def added_id(self, text: str) -> int | None:
        """The id of an added token, special or not, that is written so."""
        return self._added.get(text)

    def _named_id(self, files: TokenizerFiles, name: str) -> int | None:
        content = files.special_tokens.get(name)
        return None if content is None else self._tokenizer.token_to_id(content)


def _build(files: TokenizerFiles) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(files.spec))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"tokenizer.json: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named: Iterable[str] = (*files.special_tokens.values(), *files.additional_special_tokens)
    # those the vocabulary has are special, whether tokenizer.json says so or not; others are not added
    tokenizer.add_special_tokens([text for text in dict.fromkeys(named) if tokenizer.token_to_id(text) is not None])
    return tokenizer


def _vocabulary(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> Vocabulary:
    vocabulary = Vocabulary.of(files.spec, tokenizer)
    if not vocabulary.pieces:
        raise CheckpointError("tokenizer.json: the vocabulary is empty")
    return vocabulary


def _compile(source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, special_tokens)
    except TemplateError as error:
        raise CheckpointError(f"chat template: {error}") from None


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None
