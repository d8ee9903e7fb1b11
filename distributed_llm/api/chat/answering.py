"""A turn asked of the coordinator, and its answers taken apart as they come."""

import secrets
import string
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from distributed_llm.api.chat.events import AnswerEnded, TurnEnded, TurnEvent
from distributed_llm.api.chat.forced_calls import calls_grammar
from distributed_llm.api.chat.parsing.answer_parser import AnswerParser
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import Turn
from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.common.errors import InvalidRequest

_ALPHANUMERIC = string.ascii_letters + string.digits


class ChatClient(Protocol):
    """What a turn is asked of; an `AsyncDistributedClient`."""

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Return an iterator over the assistant's next message."""


async def answer(
    client: ChatClient, turn: Turn, formats: Formats
) -> AsyncGenerator[TurnEvent, None]:
    """Ask for a turn; yield what comes of it. Closing cancels the request.

    Events of several answers are mixed, those of each are in order. `TurnEnded` is the last.

    Args:
        formats: how the model writes reasoning and calls.

    Raises:
        InvalidRequest: the tool that must be called is none of the turn's.
        DistributedLLMError: as `AsyncDistributedClient.stream_chat`.
    """
    tools = _usable(turn)
    must_call = turn.tool_choice not in ("auto", "none")
    one_call = not turn.parallel_tool_calls or turn.tool_choice not in ("auto", "none", "required")
    params = dict(turn.params)
    arguments = dict(turn.template_arguments)
    constrained = must_call or "grammar" in params
    if constrained and formats.thinking_switch:
        arguments.setdefault(formats.thinking_switch, False)  # a grammar leaves no room for it
    if must_call:
        params["grammar"] = calls_grammar(tools, several=not one_call)
    elif not constrained and (formats.reasoning or (tools and formats.calls_tools)):
        params.setdefault("skip_special_tokens", False)  # marks may be special tokens
    parsers = [
        AnswerParser(
            formats,
            choice=choice,
            tools=tools if must_call or not constrained else (),
            begins_inside=not constrained and formats.begins_inside(arguments),
            must_call=must_call,
            one_call=one_call,
            new_call_id=_new_call_id,
        )
        for choice in range(params.get("n") or 1)
    ]
    generations: list[Generation] = []
    chunks = client.stream_chat(
        turn.messages,
        tools=turn.tools if turn.tool_choice != "none" and turn.tools else None,
        chat_template_kwargs=arguments or None,
        **params,
    )
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.generation is not None:
                generations.append(chunk.generation)
                continue
            for event in _events_of(chunk, parsers[chunk.choice]):
                yield event
    yield TurnEnded(generations=tuple(generations))


def _usable(turn: Turn) -> Sequence[Mapping[str, Any]]:
    """Return the tools that may be called.

    Raises:
        InvalidRequest: one must be called, and is not there.
    """
    if turn.tool_choice == "none":
        return ()
    if turn.tool_choice == "auto":
        return turn.tools
    if turn.tool_choice == "required":
        tools = turn.tools
    else:
        tools = [tool for tool in turn.tools if tool["function"]["name"] == turn.tool_choice]
    if not tools:
        names = ", ".join(tool["function"]["name"] for tool in turn.tools) or "none"
        raise InvalidRequest(
            f"The tool choice {turn.tool_choice!r:.100} calls for a tool that the request does not "
            f"have; it has {names:.500}. Add the tool, or choose another one."
        )
    return tools


def _events_of(chunk: Chunk, parser: AnswerParser) -> list[TurnEvent]:
    events = parser.add(chunk.text, chunk.logprobs or ())
    if chunk.finish_reason is None:
        return events
    events += parser.end()
    calls = parser.calls and chunk.finish_reason == "stop"
    ended = AnswerEnded(
        choice=chunk.choice,
        reason="tool_calls" if calls else chunk.finish_reason,
        stop_string=chunk.stop_string,
    )
    return [*events, ended]


def _new_call_id() -> str:
    """Return an id of nine letters and digits; templates of Mistral's models take no other."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
