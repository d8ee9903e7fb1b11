"""What comes of a turn of a conversation, in its order; dialects write it down. Pure values."""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.client.answers import Generation, PickedToken


@dataclass(frozen=True, kw_only=True)
class ReasoningDelta:
    """More of what the model thinks before it answers.

    Attributes:
        choice: index of the answer, of the turn's `n`.
    """

    choice: int
    text: str


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """More text of an answer.

    Attributes:
        choice: index of the answer, of the turn's `n`.
        tokens: what the text was picked from, if log-probabilities were asked for.
    """

    choice: int
    text: str
    tokens: tuple[PickedToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ToolCallBegun:
    """The model calls a tool.

    Attributes:
        choice: index of the answer, of the turn's `n`.
        index: of the call, of those of this answer.
        id: by which the tool's answer names the call.
        name: of the tool.
    """

    choice: int
    index: int
    id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """More of the arguments of a call.

    Attributes:
        choice: index of the answer, of the turn's `n`.
        index: of the call, of those of this answer.
        arguments: the next piece of a JSON object.
    """

    choice: int
    index: int
    arguments: str


@dataclass(frozen=True, kw_only=True)
class AnswerEnded:
    """An answer is complete.

    Attributes:
        choice: index of the answer, of the turn's `n`.
        reason: the model or a stop string ended it, it is as long as it may be, or it calls tools.
        stop_string: the stop string that ended it, if one did.
    """

    choice: int
    reason: Literal["stop", "length", "tool_calls"]
    stop_string: str | None = None


@dataclass(frozen=True, kw_only=True)
class TurnEnded:
    """All answers are complete; nothing follows.

    Attributes:
        generations: the answers as the coordinator gave them, by choice: counts, times, tokens.
    """

    generations: tuple[Generation, ...]


TurnEvent = ReasoningDelta | TextDelta | ToolCallBegun | ToolCallDelta | AnswerEnded | TurnEnded
