"""What the edge tells the core (events) and what the core tells the edge to do (actions)."""

from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    RequestId,
    Spelling,
    ToClient,
    ToCoordinator,
    ToWorker,
    WeightRequest,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import PeerId, TokenId
from distributed_llm.coordinator.trust.members import MembersState

RequestKey = tuple[PeerId, RequestId, int]
"""Names one request: client, the client's id for it, and a number that tells reused ids apart."""

PromptKind = Literal["text", "token_ids", "chat"]


class TextRules(msgspec.Struct, frozen=True):
    """How the text of a request's answers is made.

    Attributes:
        stop_strings: an answer ends before the first of these.
        hidden: special tokens that are left out of the text; None: all are.
        grammar: that the text has to follow; None if there is none.
        ends: tokens that may be sampled where the grammar is complete, and end the answer there.
        first: how the first token is written, where its id is wanted; else empty.
        source: name of the language that the prompt is in; empty: the tokenizer's usual one.
        target: name of the language whose token is the first one; else empty.
    """

    stop_strings: tuple[str, ...] = ()
    hidden: tuple[TokenId, ...] | None = None
    grammar: Grammar | None = None
    ends: tuple[TokenId, ...] = ()
    first: str = ""
    source: str = ""
    target: str = ""


@dataclass(frozen=True)
class Received:
    """Event: a peer sent a message.

    Attributes:
        key: that the peer holds; `NOBODY` without keys.
    """

    peer: PeerId
    message: ToCoordinator | WeightRequest
    frames: tuple[Frame, ...] = ()
    key: PublicKey = NOBODY


@dataclass(frozen=True)
class Garbage:
    """Event: a peer sent bytes that are no valid message.

    Attributes:
        reason: name of the counter of rejected messages to increase.
        key: that the peer holds; `NOBODY` without keys.
    """

    peer: PeerId
    reason: str
    error: DistributedLLMError
    key: PublicKey = NOBODY


@dataclass(frozen=True)
class ConnectionClosed:
    """Event: some connection was closed; messages to all peers find out whose."""


@dataclass(frozen=True)
class Unreachable:
    """Event: a message could not be sent to a peer.

    Attributes:
        why: the reason, as it continues "worker NAME ..." in the log.
    """

    peer: PeerId
    why: str


@dataclass(frozen=True)
class Stalled:
    """Event: the coordinator itself stood still; the clock stood still with it.

    Attributes:
        stall_s: for how long, seconds.
    """

    stall_s: float


@dataclass(frozen=True)
class Tokenized:
    """Event: a prompt was turned into token ids.

    Attributes:
        mask: which token may be the first of an answer, as in `Task`; empty without a grammar.
        first: id of the token that `TextRules` name as the first; None if they name none.
    """

    key: RequestKey
    token_ids: list[int]
    mask: bytes = b""
    first: TokenId | None = None


@dataclass(frozen=True)
class TextFailed:
    """Event: a prompt could not be turned into token ids, or an answer into text."""

    key: RequestKey
    error: DistributedLLMError


@dataclass(frozen=True)
class Detokenized:
    """Event: the next tokens of an answer were turned into text.

    Attributes:
        choice: index of the answer among those of its request.
        num_tokens: tokens of the answer that its text so far is made of.
        stop_string: the stop string that ended the text; None if none did.
        last: whether the answer has no further tokens.
        spelled: how the tokens of `Detokenize.spell` are written, None for one that the tokenizer
            does not know; empty if there is none.
        mask: which token may be the next, as in `Task`; empty without a grammar.
        complete: whether the grammar admits no further token, so that the answer ends.
    """

    key: RequestKey
    choice: int
    text: str
    num_tokens: int
    stop_string: str | None
    last: bool
    spelled: tuple[Spelling | None, ...] = ()
    mask: bytes = b""
    complete: bool = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self.stop_string is not None


@dataclass(frozen=True)
class TextAnswered:
    """Event: what `AskText` asked.

    Attributes:
        payload: token ids as int32, or the text in UTF-8.
    """

    key: RequestKey
    payload: bytes


class Question(Protocol):
    """Planning that takes milliseconds, done in another thread on values that nobody changes."""

    def reply(self) -> object:
        """Compute and return the reply; may be called from any thread."""


@dataclass(frozen=True)
class Studied:
    """Event: the question of a `Study` was answered."""

    reply: object


@dataclass(frozen=True)
class StudyFailed:
    """Event: answering the question of a `Study` raised an exception, which is a bug.

    Attributes:
        error: the exception, for those who wait for a plan.
        trace: where it was raised, for the log.
    """

    question: Question
    error: str
    trace: str


Event = (
    Received
    | Garbage
    | ConnectionClosed
    | Unreachable
    | Stalled
    | Tokenized
    | TextFailed
    | Detokenized
    | TextAnswered
    | Studied
    | StudyFailed
)


@dataclass(frozen=True)
class Send:
    """Action: send a message to a peer; `Unreachable` follows if that is impossible."""

    peer: PeerId
    message: ToWorker | ToClient
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class KeepMembers:
    """Action: keep who may connect for the next process, before what follows is done."""

    state: MembersState


@dataclass(frozen=True)
class AnswerAboutWeights:
    """Action: answer a worker that asks about the weights of the model, or reads them."""

    peer: PeerId
    request: WeightRequest


@dataclass(frozen=True)
class Tokenize:
    """Action: turn a request's prompt into token ids, and prepare to turn its answers into text.

    Attributes:
        num_choices: number of answers.
        rules: for the text of the answers.
    """

    key: RequestKey
    kind: PromptKind
    payload: bytes
    num_choices: int
    rules: TextRules


@dataclass(frozen=True)
class Detokenize:
    """Action: turn the next tokens of an answer into text.

    Attributes:
        choice: index of the answer among those of its request.
        last: whether these are its last tokens.
        spell: tokens to tell the spelling of besides, each by itself.
    """

    key: RequestKey
    choice: int
    token_ids: tuple[int, ...]
    last: bool
    spell: tuple[int, ...] = ()


@dataclass(frozen=True)
class Forget:
    """Action: forget a request, of which no more text is needed."""

    key: RequestKey


@dataclass(frozen=True)
class AskText:
    """Action: turn a prompt into token ids, or token ids into text, and no more.

    `TextAnswered` or `TextFailed` follows, whatever becomes of who asked.

    Attributes:
        special: whether with special tokens; a conversation has its own.
    """

    key: RequestKey
    kind: PromptKind
    payload: bytes
    special: bool


@dataclass(frozen=True)
class Study:
    """Action: answer a question in another thread; `Studied` or `StudyFailed` follows.

    Planning takes 2 to 200 ms, which no token should wait for.
    """

    question: Question


@dataclass(frozen=True)
class Log:
    """Action: write a line for the operator.

    Attributes:
        kind: what lines like it are about, for people; the core gives a log so many of a kind.
    """

    text: str
    level: Literal["info", "warning", "error"] = "info"
    kind: str = "others"


@dataclass(frozen=True)
class Stop:
    """Action: end the coordinator with an error: it can never serve this model."""

    error: DistributedLLMError


Action = (
    Send
    | KeepMembers
    | AnswerAboutWeights
    | Tokenize
    | Detokenize
    | Forget
    | AskText
    | Study
    | Log
    | Stop
)
