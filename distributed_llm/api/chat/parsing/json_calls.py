"""Calls that a model writes as JSON: `{"name": ..., "arguments": {...}}`."""

import re
from collections.abc import Callable, Collection

import msgspec

from distributed_llm.api.chat.parsing.json_end import JsonEnd
from distributed_llm.api.chat.parsing.parts import Parts, Step

MAX_HELD_CHARS = 65536
"""Of a call whose arguments do not follow its name, and so cannot be told as they come."""

_WINDOW = 1024

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"\\]*)"|[^"\s])')
_KEYS = {"name", "arguments", "parameters", "type", "id", "function"}


class _Function(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


class _Call(msgspec.Struct):
    function: _Function


class JsonCall:
    """Reads one call.

    Args:
        start: where its `{` stands, counted from what is not told of yet.
        names: of the tools that it must be a call of; None for whatever it calls.
        done: the step after it.
        not_a_call: makes text of what stands before a place, and goes on.
    """

    def __init__(
        self,
        parts: Parts,
        start: int,
        *,
        names: Collection[str] | None,
        done: Step,
        not_a_call: Callable[[int], Step],
    ) -> None:
        self._parts = parts
        self._start = start
        self._names = names
        self._done = done
        self._not_a_call = not_a_call
        self._end = JsonEnd()
        self._scanned = start

    def read(self) -> Step | None:
        """Read what comes before the arguments, or the whole call if they do not come last."""
        text, start = self._parts.text, self._parts.at + self._start
        if head := _HEAD.match(text, start, start + _WINDOW):
            name = _decoded(head[1])
            if not name or not self._is_known(name):
                return self._not_a_call(head.end())
            self._parts.hide(head.end())
            self._parts.begin_call(name)
            return Arguments(self._parts, self._rest, depth=1).read
        key = _FIRST_KEY.match(text, start, start + _WINDOW)
        if key and key[1] not in _KEYS:
            return self._not_a_call(key.end())
        return self._read_whole()

    def _read_whole(self) -> Step | None:
        parts = self._parts
        limit = parts.at + self._start + MAX_HELD_CHARS
        stop = min(len(parts.text), limit)
        end = self._end.find(parts.text, parts.at + self._scanned, stop)
        if end is None:
            self._scanned = stop - parts.at
            return self._not_a_call(stop) if parts.complete or stop == limit else None
        called = _whole_call(parts.text[parts.at + self._start : end])
        if called is None or not self._is_known(called[0]):
            return self._not_a_call(end)
        parts.hide(end)
        parts.begin_call(called[0])
        parts.argue(called[1])
        return self._done

    def _is_known(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _rest(self) -> Step | None:
        """Pass over what follows the arguments."""
        parts = self._parts
        end = parts.after_space(parts.at)
        if end is None:
            return None
        match parts.text[end : end + 1]:
            case "}":
                parts.hide(end + 1)
                return self._done
            case ",":
                parts.hide(end)
                self._end = JsonEnd(depth=1)
                return self._pass_rest
        return self._done

    def _pass_rest(self) -> Step | None:
        parts = self._parts
        end = self._end.find(parts.text, parts.at, len(parts.text))
        parts.hide(len(parts.text) if end is None else end)
        return None if end is None else self._done


class Arguments:
    """Tells a JSON object as it comes, up to its end.

    Args:
        done: the step after it.
        depth: objects and arrays that stand around it.
    """

    def __init__(self, parts: Parts, done: Step, *, depth: int = 0) -> None:
        self._parts = parts
        self._done = done
        self._depth = depth
        self._end = JsonEnd(depth=depth)

    def read(self) -> Step | None:
        """Tell what has come."""
        parts = self._parts
        end = self._end.find(parts.text, parts.at, len(parts.text), depth=self._depth)
        stop = len(parts.text) if end is None else end
        parts.argue(parts.text[parts.at : stop])
        parts.hide(stop)
        return None if end is None else self._done


def _whole_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments of a call; None if it is none."""
    try:
        try:
            function = msgspec.json.decode(text, type=_Function)
        except msgspec.ValidationError:
            function = msgspec.json.decode(text, type=_Call).function
        arguments = bytes(function.arguments or function.parameters).decode()
        if arguments.startswith('"'):  # JSON in JSON
            arguments = msgspec.json.decode(arguments, type=str)
        msgspec.json.decode(arguments, type=dict)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return (function.name, arguments) if function.name else None


def _decoded(text: str) -> str | None:
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.MsgspecError, ValueError):
        return None
