"""Prompts from standard input."""

import io
import sys
from typing import Any

import pytest

from distributed_llm.common import tensors
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.streams import read_prompt

LIMIT = 3 << 20


class Yes(io.RawIOBase):
    """Says yes as often as one reads, within reason."""

    def __init__(self) -> None:
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self.given <= 2 * LIMIT, "all of an endless stream is read"
        size = len(buffer)
        buffer[:] = (b"y\n" * size)[:size]
        self.given += size
        return size


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_FRAME_BYTES", LIMIT)


def stdin(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream, "utf-8"))


def test_an_endless_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, io.BufferedReader(Yes()))
    with pytest.raises(InvalidRequest, match=r"longer than 3\.0 MiB, .* Give a shorter one"):
        read_prompt()


def test_the_longest_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, io.BytesIO(b"y" * LIMIT))
    assert read_prompt() == "y" * LIMIT
    stdin(monkeypatch, io.BytesIO(b"y" * (LIMIT + 1)))
    with pytest.raises(InvalidRequest, match="longer than"):
        read_prompt()


def test_a_byte_that_is_wrong_is_counted_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin(monkeypatch, io.BytesIO(b"y" * (2 << 20) + b"\xff"))
    with pytest.raises(InvalidRequest, match=f"byte 0xff at position {2 << 20} "):
        read_prompt()
