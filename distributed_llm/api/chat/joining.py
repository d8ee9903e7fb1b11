"""Messages that follow one another in the same voice, made one."""

from collections.abc import Iterable, Mapping
from typing import Any

_SYSTEM = ("system", "developer")


def join_neighbours(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which no voice follows itself, but for tools.

    Chat templates of many models refuse others, and clients send several messages of the user, and
    each call that the assistant made as a message of its own.
    """
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and _same_voice(joined[-1], message):
            joined[-1] = _join(joined[-1], message)
        else:
            joined.append(dict(message))
    return joined


def _same_voice(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    speaks, answers = str(one["role"]), str(other["role"])
    if speaks in _SYSTEM:
        return answers in _SYSTEM
    return speaks == answers != "tool"


def _join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {
        **one,
        "role": one["role"] if one["role"] == other["role"] else "system",
    }
    for name in ("content", "reasoning_content"):
        if texts := [part[name] for part in (one, other) if part.get(name)]:
            message[name] = "\n\n".join(texts)
    if calls := [*one.get("tool_calls", ()), *other.get("tool_calls", ())]:
        message["tool_calls"] = calls
    return message
