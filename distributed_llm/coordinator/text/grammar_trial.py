"""Tries grammars in processes of their own, as one may take for ever, or end the process.

llguidance bounds most of what it does, but not all: the intersection of some hundred expressions
takes minutes, and rules that name each other in a long chain exhaust the stack. A trial compiles
the grammar for an alphabet of bytes, which takes about as long as for any vocabulary.
"""

import contextlib
import faulthandler
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import IO, Final

import msgspec

from distributed_llm.common.errors import InvalidRequest, TextError
from distributed_llm.common.grammar import Grammar
from distributed_llm.coordinator.text.grammar_compiler import (
    Vocabulary,
    compile_grammar,
    wrong_grammar,
)

TRIAL_S: Final = 2.0
"""Time that compiling a grammar may take, seconds."""

_LENGTH_BYTES = 8
_READY = "ready"

_decoder = msgspec.msgpack.Decoder(Grammar)


class Trials:
    """Processes that try grammars, started when they are needed. Thread-safe.

    Args:
        special: how special tokens are written, which grammars may name.
        limit_s: time that compiling a grammar may take, seconds.
    """

    def __init__(self, special: Sequence[bytes], limit_s: float = TRIAL_S) -> None:
        self._limit_s = limit_s
        self._terms = msgspec.msgpack.encode((limit_s, special))
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        weakref.finalize(self, _end_all, self._idle)

    def run(self, grammar: Grammar) -> None:
        """Return if the grammar can be compiled in time.

        Raises:
            InvalidRequest: it cannot, with the reason.
            TextError: no process can be started.
        """
        process = self._take()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended, which is seen below
            _write(process.stdin, msgspec.msgpack.encode(grammar))
        reply = _read(process.stdout)
        if reply is None:
            raise self._unfit(_end(process))
        self._idle.put(process)
        if reply:
            raise wrong_grammar(reply.decode())

    def _unfit(self, exit_code: int) -> InvalidRequest:
        if exit_code == 1:
            return wrong_grammar(f"compiling it takes more than {self._limit_s:g} s. Simplify it.")
        return wrong_grammar("it is nested too deeply. Simplify it.")

    def _take(self) -> "subprocess.Popen[bytes]":
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        module = "distributed_llm.coordinator.text.grammar_trial"
        try:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as exc:
            raise TextError(f"A process to try the grammar cannot be started: {exc}.") from exc
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended, which is seen below
            _write(process.stdin, self._terms)
        if _read(process.stdout) != _READY.encode():
            _end(process)
            raise TextError("The process that tries grammars does not start. Please report it.")
        return process


def _end_all(idle: "queue.SimpleQueue[subprocess.Popen[bytes]]") -> None:
    while not idle.empty():
        _end(idle.get())


def _end(process: "subprocess.Popen[bytes]") -> int:
    """End a process if it has not ended; return its exit code."""
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()
    return process.wait()


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """Return the next message, or None if there will be none."""
    length = pipe.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    size = int.from_bytes(length, "big")
    data = pipe.read(size)
    return data if len(data) == size else None


def main() -> None:
    """Try grammars from stdin until it ends; write to stdout what is wrong with each, or nothing.

    How long that may take, and the special tokens, come first.

    A grammar that takes too long ends the process with exit code 1.
    """
    terms = _read(sys.stdin.buffer) or b""
    limit_s, special = msgspec.msgpack.decode(terms, type=tuple[float, list[bytes]])
    tokenizer = Vocabulary(
        [*(bytes([byte]) for byte in range(256)), *special],
        range(256, 256 + len(special)),
        lambda text: list(text.encode()),
    ).for_llguidance()
    replies, quiet = sys.stdout.buffer, open(os.devnull, "w")  # noqa: SIM115 - until the end
    _write(replies, _READY.encode())
    while (data := _read(sys.stdin.buffer)) is not None:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=quiet)  # whoever holds the GIL
        why = ""
        try:
            matcher = compile_grammar(tokenizer, _decoder.decode(data))
            matcher.compute_bitmask()
            why = matcher.get_error()
        except Exception as exc:  # whatever a grammar causes
            why = str(exc).removeprefix(str(wrong_grammar("")))
        faulthandler.cancel_dump_traceback_later()
        _write(replies, why.encode())


if __name__ == "__main__":
    main()
