"""The standard streams of the `dllm` command: full, closed, or in a character set that lacks some.

Data that cannot be written is an error. Messages that cannot be written are lost, and stop nothing.
Characters that a stream cannot write are escaped.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from distributed_llm.common.errors import InvalidRequest, OutputFailed
from distributed_llm.common.wording import size_text

_PIECE_BYTES = 1 << 20
"""Read from stdin at a time."""


def prepare() -> None:
    """Give this process standard streams that behave as this module says."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    sys.stdout = _replaced(sys.stdout, _Data)
    sys.stderr = _replaced(sys.stderr, _Messages)


def read_prompt() -> str:
    """Return all of stdin.

    Raises:
        InvalidRequest: it is closed, longer than a prompt may be, or not in the encoding that it
            should be in.
    """
    from distributed_llm.common.tensors import MAX_FRAME_BYTES  # loads NumPy

    data = bytearray()
    try:
        while piece := sys.stdin.buffer.read(_PIECE_BYTES):
            data += piece
            if len(data) > MAX_FRAME_BYTES:
                raise InvalidRequest(
                    f"The prompt on standard input is longer than {size_text(MAX_FRAME_BYTES)}, "
                    "the most that can be sent. Give a shorter one."
                )
            if len(piece) < _PIECE_BYTES:  # asking again would want a second Ctrl-D at a terminal
                break
        return _text_of(data, sys.stdin.encoding)
    except UnicodeDecodeError as exc:
        raise InvalidRequest(
            f"The prompt on standard input is not {exc.encoding}: byte "
            f"0x{exc.object[exc.start]:02x} at position {exc.start} cannot be read. Convert it, or "
            "say what it is, such as PYTHONIOENCODING=latin-1 in the environment."
        ) from exc
    except OSError as exc:
        raise InvalidRequest(
            f"The prompt cannot be read from standard input: {_reason(exc)}. Give it as an "
            "argument."
        ) from exc


def writes_unicode() -> bool:
    """Return whether stdout can write every character."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")


class _Data(io.TextIOWrapper):
    """Standard output."""

    _told = False

    def write(self, text: str) -> int:
        self._tell_of_escapes(text)
        with _failures_told():
            return super().write(text)

    def flush(self) -> None:
        with _failures_told():
            super().flush()

    def _tell_of_escapes(self, text: str) -> None:
        if self._told or writes_unicode():
            return
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            self._told = True
            print(
                f"Standard output is in {self.encoding} and lacks some characters: they are "
                "written like \\u4f60. To have them as they are, set PYTHONIOENCODING=utf-8 in the "
                "environment.",
                file=sys.stderr,
            )


class _Messages(io.TextIOWrapper):
    """Standard error."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _replaced(stream: TextIO, kind: type[io.TextIOWrapper]) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # a test's, or an embedding program's
        return stream
    lines = stream.line_buffering
    encoding = stream.encoding
    return kind(stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=lines)


@contextlib.contextmanager
def _failures_told() -> Iterator[None]:
    """Raise `OutputFailed` instead of errors of the system, except that nobody reads any more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OutputFailed(
            f"Standard output cannot be written: {_reason(exc)}. Give the output another place."
        ) from exc


def _text_of(data: bytes | bytearray, encoding: str) -> str:
    """Return text with newlines as Python has them."""
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors="strict").read()


def _reason(error: OSError) -> str:
    return "it is closed" if error.errno == errno.EBADF else os.strerror(error.errno or 0)
