"""An answer, as its text comes: what the model thinks, says, and which tools it calls."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distributed_llm.api.chat.events import TurnEvent
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.parsing.json_calls import Arguments, JsonCall
from distributed_llm.api.chat.parsing.parts import Parts, Step
from distributed_llm.api.chat.parsing.tag_calls import TagCall
from distributed_llm.client.answers import PickedToken

_TAG = "<tool_call>"
_TAG_END = "</tool_call>"
_LIST = "[TOOL_CALLS]"
_PYTHON = "<|python_tag|>"

_TRIMMED_SPACES = 4
"""White space at the end of reasoning that belongs to the mark that closes it, at most."""

_NAME_WINDOW = 512
_NAME = re.compile(r"\s*[\w./-]{1,128}")
_NAMED = re.compile(r"\s*([\w./-]{1,128})(?:\[CALL_ID\](\w{1,64}))?\[ARGS\]\s*(?=\{)")


class AnswerParser:
    """Takes the text of one answer apart, whatever pieces it comes in.

    No text is lost: what looks like a call and is none is text. Only white space around calls and
    reasoning is left out, and what a model writes after a call although it may call only one tool.

    Args:
        formats: how the model writes.
        choice: index of the answer.
        tools: that it may call, as OpenAI's chats have them; without any, calls are text.
        begins_inside: it begins inside the reasoning.
        must_call: it is nothing but a JSON list of calls.
        one_call: it ends with its first call.
        new_call_id: makes the ids of calls.
    """

    def __init__(
        self,
        formats: Formats,
        *,
        choice: int = 0,
        tools: Sequence[Mapping[str, Any]] = (),
        begins_inside: bool = False,
        must_call: bool = False,
        one_call: bool = False,
        new_call_id: Callable[[], str],
    ) -> None:
        self._formats = formats
        self._schemas = dict(map(_name_and_schema, tools))
        self._one_call = one_call
        self._parts = Parts(choice, new_call_id)
        self._body = 0  # where a call begins after its mark, counted from what is not told of yet
        self._reasoning = formats.reasoning or ("", "")
        self._has_reasoned = False
        self._in_list = False
        self._marks = _marks(formats) if tools else ()
        self._any_mark = re.compile("|".join(map(re.escape, self._marks))) if self._marks else None
        self._reads_plain = bool(tools) and formats.plain_calls
        self._step: Step = self._begin
        if must_call:
            self._step = self._open_list
        elif begins_inside and formats.reasoning:
            self._step = self._begin_reasoning

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._parts.calls

    def add(self, text: str, tokens: Sequence[PickedToken] = ()) -> list[TurnEvent]:
        """Return what comes of the next piece."""
        self._parts.add(text, tokens)
        self._run()
        return self._parts.take_events()

    def end(self) -> list[TurnEvent]:
        """Return what is left once all has come."""
        self._parts.complete = True
        self._run()
        if self._step == self._say and not self.calls:
            self._parts.show_last_tokens()
        return self._parts.take_events()

    def _run(self) -> None:
        while following := self._step():
            self._step = following

    # Before any text: reasoning may begin, or a call.

    def _begin(self) -> Step | None:
        parts = self._parts
        start = parts.after_space(parts.at)
        if start is None:
            return None
        opens = self._reasoning[0] if not self._has_reasoned else ""
        marks = [mark for mark in (opens, *self._marks) if mark]
        found = {mark: parts.begins(mark, start) for mark in marks}
        if None in found.values():
            return None
        if opens and found[opens]:
            parts.hide(start + len(opens))
            return self._begin_reasoning
        for mark in self._marks:
            if found[mark]:
                return self._open(mark, start + len(mark) - parts.at)
        if self._reads_plain and parts.text.startswith("{", start):
            return self._json_call(start - parts.at, names=self._schemas)
        if self._has_reasoned:
            parts.hide(start)
        return self._say

    def _begin_reasoning(self) -> Step | None:
        """Pass over what stands before the first thought, perhaps the opening mark again."""
        parts = self._parts
        start = parts.after_space(parts.at)
        if start is None:
            return None
        again = parts.begins(self._reasoning[0], start)
        if again is None:
            return None
        parts.hide(start + len(self._reasoning[0]) if again else start)
        return self._begin_reasoning if again else self._reason

    def _reason(self) -> Step | None:
        parts, closes = self._parts, self._reasoning[1]
        place = parts.text.find(closes, parts.at)
        if place < 0:
            held = 0 if parts.complete else _unsure(parts.text, parts.at, (closes,))
            parts.reason(self._before_space(len(parts.text) - held, keep=parts.complete))
            return None
        parts.reason(self._before_space(place))
        parts.hide(place + len(closes))
        self._has_reasoned = True
        return self._begin

    def _before_space(self, end: int, *, keep: bool = False) -> int:
        """Return where the white space before `end` begins."""
        first = end if keep else max(self._parts.at, end - _TRIMMED_SPACES)
        while end > first and self._parts.text[end - 1].isspace():
            end -= 1
        return end

    # Text, up to where a call may begin.

    def _say(self) -> Step | None:
        parts = self._parts
        mark = self._any_mark.search(parts.text, parts.at) if self._any_mark else None
        if mark:
            parts.show(mark.start())
            return self._open(mark[0], len(mark[0]))
        held = 0 if parts.complete else _unsure(parts.text, parts.at, self._marks)
        parts.show(len(parts.text) - held)
        return None

    def _not_a_call(self, end: int) -> Step:
        self._in_list = False
        self._parts.show(end)
        return self._say

    # Calls.

    def _open(self, mark: str, body: int) -> Step:
        """Go on after a mark, `body` characters after what is not told of yet."""
        self._body = body
        if mark == _LIST:
            return self._open_list
        return self._open_tag if mark == _TAG else self._open_plain

    def _open_plain(self) -> Step | None:
        parts = self._parts
        start = parts.after_space(parts.at + self._body)
        if start is None:
            return None
        if parts.text.startswith("{", start):
            return self._json_call(start - parts.at)
        return self._not_a_call(start)

    def _open_tag(self) -> Step | None:
        parts = self._parts
        start = parts.after_space(parts.at + self._body)
        if start is None:
            return None
        if parts.text.startswith("{", start):
            return self._json_call(start - parts.at)
        is_tag = parts.begins("<function=", start)
        if is_tag is None:
            return None
        if is_tag:
            return TagCall(
                parts,
                start - parts.at,
                schemas=self._schemas,
                done=self._end_call,
                not_a_call=self._not_a_call,
            ).read
        return self._not_a_call(start)

    def _open_list(self) -> Step | None:
        parts = self._parts
        body = parts.at + self._body
        start = parts.after_space(body)
        if start is None:
            return None
        match parts.text[start : start + 1]:
            case "{":
                return self._json_call(start - parts.at)
            case "[":
                item = parts.after_space(start + 1)
                if item is None:
                    return None
                if parts.text.startswith("{", item):
                    self._in_list = True
                    return self._json_call(item - parts.at)
                return self._not_a_call(item)
        return self._open_named(body)

    def _open_named(self, body: int) -> Step | None:
        parts = self._parts
        if named := _NAMED.match(parts.text, body, body + _NAME_WINDOW):
            parts.hide(named.end())
            parts.begin_call(named[1], named[2])
            return Arguments(parts, self._end_call).read
        name = _NAME.match(parts.text, body, body + _NAME_WINDOW)
        end = name.end() if name else body
        could_be = parts.text[end : end + 1] in ("[", "")
        if could_be and len(parts.text) < body + _NAME_WINDOW and not parts.complete:
            return None
        return self._not_a_call(min(len(parts.text), body + _NAME_WINDOW) if could_be else end)

    def _json_call(self, start: int, names: Mapping[str, Any] | None = None) -> Step:
        return JsonCall(
            self._parts,
            start,
            names=names,
            done=self._end_call,
            not_a_call=self._not_a_call,
        ).read

    def _end_call(self) -> Step | None:
        """Pass over what ends a call, or parts it from the next."""
        if self._one_call:
            return self._pass_all
        parts = self._parts
        start = parts.after_space(parts.at)
        if start is None:
            return None
        separators = {",": True, "]": False} if self._in_list else {}
        if self._reads_plain:
            separators[";"] = False
        after = parts.text[start : start + 1]
        if after in separators:
            self._in_list = separators[after]
            parts.hide(start + 1)
            return self._end_call
        if after == "{" and (self._in_list or self._reads_plain):
            return self._json_call(start - parts.at, None if self._in_list else self._schemas)
        self._in_list = False
        return self._end_or_open(start)

    def _end_or_open(self, start: int) -> Step | None:
        parts = self._parts
        ends = (_TAG_END,) if self._formats.tagged_calls else ()
        found = {mark: parts.begins(mark, start) for mark in (*ends, *self._marks)}
        if None in found.values():
            return None
        parts.hide(start)
        for mark in (mark for mark, begins in found.items() if begins):
            if mark in self._marks:
                return self._open(mark, len(mark))
            parts.hide(start + len(mark))
            return self._end_call
        return self._say

    def _pass_all(self) -> None:
        self._parts.hide(len(self._parts.text))


def _name_and_schema(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    function = tool["function"]
    return function["name"], function.get("parameters") or {}


def _marks(formats: Formats) -> tuple[str, ...]:
    shown = (
        (_TAG, formats.tagged_calls),
        (_LIST, formats.listed_calls),
        (_PYTHON, formats.plain_calls),
    )
    return tuple(mark for mark, is_shown in shown if is_shown)


def _unsure(text: str, start: int, marks: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    most = min(len(text) - start, max(map(len, marks), default=1) - 1)
    ends = (n for n in range(most, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks))
    return next(ends, 0)
