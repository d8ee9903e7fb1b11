"""Responses that are kept for whoever asked for them, as long as there is room."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_MAX_RESPONSES = 4096

_MAX_BYTES = 64 << 20


class Record(msgspec.Struct, frozen=True):
    """A response that is kept.

    Attributes:
        response: as it was given.
        input: the items that it answers, without those of earlier responses.
        previous: id of the response that it continues; None if it continues none.
    """

    response: dict[str, Any]
    input: list[dict[str, Any]]
    previous: str | None


@dataclass(frozen=True)
class _Key:
    caller: str
    response_id: str


class ResponseStore:
    """Keeps responses in memory; those that are used longest ago make room.

    Args:
        max_responses: kept at the same time.
        max_bytes: of them as JSON.
    """

    def __init__(self, max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[_Key, bytes] = OrderedDict()
        self._bytes = 0

    def put(self, caller: str, record: Record) -> None:
        """Keep a response, unless it alone is too large."""
        data = msgspec.json.encode(record)
        if len(data) > self._max_bytes:
            return
        self._kept[_Key(caller, record.response["id"])] = data
        self._bytes += len(data)
        while self._bytes > self._max_bytes or len(self._kept) > self._max_responses:
            self._bytes -= len(self._kept.popitem(last=False)[1])

    def get(self, caller: str, response_id: str) -> Record | None:
        """Return a response of a caller; None if it is not kept."""
        key = _Key(caller, response_id)
        data = self._kept.get(key)
        if data is None:
            return None
        self._kept.move_to_end(key)
        return msgspec.json.decode(data, type=Record)

    def delete(self, caller: str, response_id: str) -> bool:
        """Keep a response no longer; return whether it was kept."""
        data = self._kept.pop(_Key(caller, response_id), b"")
        self._bytes -= len(data)
        return bool(data)

    def conversation(self, caller: str, response_id: str) -> Sequence[dict[str, Any]] | None:
        """Return all items up to a response and with it; None if some are not kept."""
        parts: list[list[dict[str, Any]]] = []
        following: str | None = response_id
        while following is not None:
            record = self.get(caller, following)
            if record is None:
                return None
            parts.append([*record.input, *record.response["output"]])
            following = record.previous
        return [item for part in reversed(parts) for item in part]
