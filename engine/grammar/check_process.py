"""The process in which the grammars of strangers are tried: a thread that is stuck cannot be ended, a process can.

Started by engine/grammar/checker.py as `python -m engine.grammar.check_process`; frames on its standard input and
output, each a 4-byte little-endian length and a msgpack payload: the vocabulary once, answered by an empty verdict when
it is ready, then one specification after another, each answered by a verdict. It leaves at the end of its input.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from typing import BinaryIO, TypeVar

import msgspec

from engine.grammar.build import check
from engine.grammar.errors import GrammarError
from engine.grammar.spec import GrammarSpec
from engine.grammar.vocabulary import GrammarVocabulary

HEADER_BYTES = 4
MAX_MEMORY_BYTES = 2 * 2**30
"""Of address space; an ordinary grammar needs some 100 MB in all. Over it, the allocator ends the process."""

ALONE_SECONDS = 4.0
"""After so long with one grammar the process ends by itself: whoever would have killed it is gone."""

_STACK_BYTES = 2 * 2**20
"""Less than the engine's threads have: what does not overflow here does not overflow there."""

_Message = TypeVar("_Message")


class Setup(msgspec.Struct, frozen=True):
    """What is the same for all grammars. `max_chars`: the longest text that the context holds."""

    vocabulary: GrammarVocabulary
    max_chars: int


class Verdict(msgspec.Struct, frozen=True):
    """The grammar's text for the engine, or why it cannot be used."""

    source: str = ""
    error: str | None = None


def encode(message: Setup | GrammarSpec | Verdict) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(HEADER_BYTES, "little") + payload


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the server says when to leave
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    def answer(verdict: Verdict) -> None:
        answers.write(encode(verdict))
        answers.flush()

    setup = _read(requests, Setup)
    if setup is None:
        return
    tokenizer = setup.vocabulary.to_library()
    answer(Verdict())
    while (spec := _read(requests, GrammarSpec)) is not None:
        signal.setitimer(signal.ITIMER_REAL, ALONE_SECONDS)
        try:
            answer(Verdict(source=check(spec, tokenizer, setup.max_chars)))
        except GrammarError as error:
            answer(Verdict(error=str(error)))
        except RecursionError:
            answer(Verdict(error="nested too deeply"))
        except Exception as error:  # whatever the library raises for what it does not understand
            answer(Verdict(error=f"it cannot be compiled ({type(error).__name__})"))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read(stream: BinaryIO, kind: type[_Message]) -> _Message | None:
    """The next frame; None at the end of the stream."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(header, "little")), type=kind)


if __name__ == "__main__":
    main()
