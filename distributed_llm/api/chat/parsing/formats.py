"""How a model writes reasoning and calls of tools, as its chat template shows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
)

_SWITCHES = ("enable_thinking", "thinking")

_MAX_TEMPLATE_CHARS = 2**18

_TRACKING_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Formats:
    """How a model writes.

    Attributes:
        reasoning: what opens and closes its reasoning; None if it has no such marks.
        begins_thinking: whether the template itself opens the reasoning: by default, if the switch
            is on, if it is off.
        thinking_switch: argument of the template that turns reasoning on or off; None if none does.
        tagged_calls: `<tool_call>`, with JSON inside (Hermes, Qwen) or tags (Qwen3-Coder).
        plain_calls: `{"name": ..., "parameters": ...}` as the whole answer, perhaps after
            `<|python_tag|>` (Llama 3).
        listed_calls: `[TOOL_CALLS]` before a list, or before `name[ARGS]{...}` (Mistral).
    """

    reasoning: tuple[str, str] | None = None
    begins_thinking: tuple[bool, bool, bool] = (False, False, False)
    thinking_switch: str | None = None
    tagged_calls: bool = False
    plain_calls: bool = False
    listed_calls: bool = False

    @property
    def calls_tools(self) -> bool:
        """Whether it is known how the model calls tools."""
        return self.tagged_calls or self.plain_calls or self.listed_calls

    def begins_inside(self, template_arguments: Mapping[str, Any]) -> bool:
        """Return whether an answer begins inside the reasoning, which the prompt opened."""
        by_default, switched_on, switched_off = self.begins_thinking
        switch = template_arguments.get(self.thinking_switch) if self.thinking_switch else None
        if switch is None:
            return by_default
        return switched_on if switch else switched_off


@lru_cache(maxsize=16)
def detect_formats(chat_template: str | None, tool_template: str | None = None) -> Formats:
    """Return how a model writes that has this chat template.

    The template is rendered, in a sandbox, to see how it begins an answer.

    Args:
        tool_template: the one for conversations with tools, if the model has one of its own.
    """
    if not chat_template or len(chat_template) + len(tool_template or "") > _MAX_TEMPLATE_CHARS:
        return Formats()
    reasoning = next((marks for marks in _REASONING if marks[1] in chat_template), None)
    switch = next((name for name in _SWITCHES if re.search(rf"\b{name}\b", chat_template)), None)
    calling = tool_template or chat_template
    listed = "[TOOL_CALLS]" in calling
    tagged = "<tool_call>" in calling
    plain = not (listed or tagged) and (
        "<|python_tag|>" in calling or re.search(r'"parameters\\?":', calling)
    )
    return Formats(
        reasoning=reasoning,
        begins_thinking=_begins_thinking(chat_template, reasoning, switch),
        thinking_switch=switch,
        tagged_calls=tagged,
        plain_calls=bool(plain),
        listed_calls=listed,
    )


def _begins_thinking(
    template: str, reasoning: tuple[str, str] | None, switch: str | None
) -> tuple[bool, bool, bool]:
    if reasoning is None:
        return (False, False, False)
    opens, closes = reasoning

    def begins(arguments: Mapping[str, Any]) -> bool:
        prompt = _rendered(template, arguments)
        return prompt.rfind(opens) > prompt.rfind(closes)

    by_default = begins({})
    if switch is None:
        return (by_default, by_default, by_default)
    return (by_default, begins({switch: True}), begins({switch: False}))


def _rendered(template: str, arguments: Mapping[str, Any]) -> str:
    """Return the shortest conversation as text; nothing if the template refuses it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    try:
        return environment.from_string(_TRACKING_TAG.sub("", template)).render(
            messages=[{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            bos_token="",
            eos_token="",
            raise_exception=_refuse,
            strftime_now=str,
            **arguments,
        )
    except Exception:  # a template is a program; it may fail in any way
        return ""


def _refuse(message: str) -> None:
    raise TemplateError(message)
