"""Calls that a model writes in tags: `<function=f><parameter=x>1</parameter></function>`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from distributed_llm.api.chat.parsing.parts import Parts, Step

_WINDOW = 256
_FUNCTION = re.compile(r"<function=([^<>\s]{1,128})>")
_PARAMETER = re.compile(r"<parameter=([^<>\s]{1,128})>\n?(?=(?s:.))")
_END = "</parameter>"


class TagCall:
    """Reads one call; its arguments are told as JSON, with the types of the tool's schema.

    Args:
        start: where it begins, counted from what is not told of yet.
        schemas: of the parameters of each tool.
        done: the step after it.
        not_a_call: makes text of what stands before a place, and goes on.
    """

    def __init__(
        self,
        parts: Parts,
        start: int,
        *,
        schemas: Mapping[str, Mapping[str, Any]],
        done: Step,
        not_a_call: Callable[[int], Step],
    ) -> None:
        self._parts = parts
        self._start = start
        self._schemas = schemas
        self._done = done
        self._not_a_call = not_a_call
        self._types: Mapping[str, frozenset[str]] = {}
        self._told = 0
        self._key = ""
        self._searched = 0

    def read(self) -> Step | None:
        """Read the name."""
        parts, start = self._parts, self._parts.at + self._start
        function = _FUNCTION.match(parts.text, start, start + _WINDOW)
        if function is None:
            known_not_to_be = len(parts.text) >= start + _WINDOW or parts.complete
            return self._not_a_call(start) if known_not_to_be else None
        parts.hide(function.end())
        parts.begin_call(function[1])
        self._types = _types(self._schemas.get(function[1], {}))
        return self._next

    def _next(self) -> Step | None:
        """Read where the next parameter begins, or the end."""
        parts = self._parts
        start = parts.after_space(parts.at)
        if start is None:
            return None
        if parts.text.startswith("<parameter=", start):
            return self._begin(start)
        ends = parts.begins("</function>", start)
        if ends is None or parts.begins("<parameter=", start) is None:
            return None
        if parts.complete and start == len(parts.text):
            return None  # broken off: its arguments stay open
        parts.hide(start + len("</function>") if ends else start)
        return self._close()

    def _close(self) -> Step:
        self._parts.argue("}" if self._told else "{}")
        return self._done

    def _begin(self, start: int) -> Step | None:
        parts = self._parts
        parameter = _PARAMETER.match(parts.text, start, start + _WINDOW)
        if parameter is None:
            if len(parts.text) < start + _WINDOW and not parts.complete:
                return None
            return self._close()
        parts.hide(parameter.end())
        self._key = parameter[1]
        parts.argue(f"{', ' if self._told else '{'}{_json(self._key)}: ")
        self._told += 1
        if self._types.get(self._key, _STRING) == _STRING:
            parts.argue('"')
            return self._read_string
        self._searched = 0
        return self._read_value

    def _read_string(self) -> Step | None:
        """Tell a string as it comes."""
        parts = self._parts
        end = parts.text.find(_END, parts.at)
        held = 0 if parts.complete else _held(parts.text[parts.at :])
        stop = end if end >= 0 else len(parts.text) - held
        if end >= 0 and parts.text[parts.at : end].endswith("\n"):
            stop -= 1
        parts.argue(_json(parts.text[parts.at : stop])[1:-1])
        parts.hide(stop)
        if end < 0:
            return None
        parts.argue('"')
        parts.hide(end + len(_END))
        return self._next

    def _read_value(self) -> Step | None:
        """Tell another value once it is there."""
        parts = self._parts
        end = parts.text.find(_END, parts.at + self._searched)
        if end < 0:
            self._searched = max(0, parts.ahead() - len(_END))
            if parts.complete:  # broken off
                parts.argue(parts.text[parts.at :])
                parts.hide(len(parts.text))
            return None
        written = parts.text[parts.at : end].removesuffix("\n")
        parts.argue(_value(written, self._types[self._key]))
        parts.hide(end + len(_END))
        return self._next


_STRING = frozenset({"string"})


def _types(schema: Mapping[str, Any]) -> Mapping[str, frozenset[str]]:
    """Return the types of each parameter that tells them."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    types = {key: _types_of(one) for key, one in properties.items()}
    return {key: found for key, found in types.items() if found}


def _types_of(schema: Any) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return frozenset()
    choices = [schema, *_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))]
    given = [choice.get("type") for choice in choices if isinstance(choice, Mapping)]
    named = [name for one in given for name in (_listed(one) or [one])]
    return frozenset(name for name in named if isinstance(name, str))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _value(written: str, types: frozenset[str]) -> str:
    """Return a value as JSON: as it is written if it is JSON, or else a string."""
    if "string" in types and written != "null":
        return _json(written)
    try:
        msgspec.json.decode(written)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {"True": "true", "False": "false", "None": "null"}.get(written) or _json(written)
    return written


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _held(text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of its end."""
    marker = "\n" + _END
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith((marker[:n], _END[:n]))), 0)
