"""Messages that follow one another in the same voice, made one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SYSTEM = ("system", "developer")


def join_neighbours(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which no voice follows itself, but for tools.

    Chat templates of many models refuse others, and clients send several messages of the user, and
    each call that the assistant made as a message of its own.
    """
    groups: list[list[Mapping[str, Any]]] = []
    for message in messages:
        if groups and _same_voice(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    return [_joined(group) for group in groups]


def _same_voice(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    speaks, answers = str(one["role"]), str(other["role"])
    if speaks in _SYSTEM:
        return answers in _SYSTEM
    return speaks == answers != "tool"


def _joined(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return messages of one voice as one message."""
    message = dict(group[0])
    if len(group) == 1:
        return message
    if any(one["role"] != message["role"] for one in group):
        message["role"] = "system"
    for name in ("content", "reasoning_content"):
        if texts := [one[name] for one in group if one.get(name)]:
            message[name] = "\n\n".join(texts)
    if calls := [call for one in group for call in one.get("tool_calls", ())]:
        message["tool_calls"] = calls
    return message
