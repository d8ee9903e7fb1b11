"""What the edge tells the core (events) and what the core tells the edge to do (actions)."""

from dataclasses import dataclass
from typing import Literal, Protocol

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import RequestId, ToClient, ToCoordinator, ToWorker
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import PeerId

RequestKey = tuple[PeerId, RequestId, int]
"""Names a ticket for good: clients choose ids, and may use them again; the number is ours."""

PromptKind = Literal["text", "token_ids", "chat"]


@dataclass(frozen=True)
class Received:
    """Event: a peer sent a message."""

    peer: PeerId
    message: ToCoordinator
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """Event: a peer sent what is no message; `reason` is a counter's name."""

    peer: PeerId
    reason: str
    error: DistributedLLMError


@dataclass(frozen=True)
class ConnectionClosed:
    """Event: some connection was closed; a send tells whose."""


@dataclass(frozen=True)
class Unreachable:
    """Event: a message could not be sent; `why` goes into the log."""

    peer: PeerId
    why: str


@dataclass(frozen=True)
class Tokenized:
    """Event: the token ids of a prompt."""

    key: RequestKey
    token_ids: list[int]


@dataclass(frozen=True)
class TokenizeFailed:
    """Event: a prompt that cannot be read."""

    key: RequestKey
    error: DistributedLLMError


@dataclass(frozen=True)
class Detokenized:
    """Event: the text of an answer's next tokens.

    Attributes:
        choice: which of the ticket's answers.
        num_tokens: of the answer that the text so far stands for.
        stopped: a stop string ended the text.
        last: the text is complete.
    """

    key: RequestKey
    choice: int
    text: str
    num_tokens: int
    stopped: bool
    last: bool


class Question(Protocol):
    """What takes long to find out. It knows only values that nobody changes."""

    def answer(self) -> object:
        """Return the answer; may be called from any thread."""


@dataclass(frozen=True)
class Studied:
    """Event: a question is answered."""

    answer: object


@dataclass(frozen=True)
class StudyFailed:
    """Event: answering a question raised an exception, which is a bug."""

    question: Question
    error: str


Event = (
    Received
    | Garbage
    | ConnectionClosed
    | Unreachable
    | Tokenized
    | TokenizeFailed
    | Detokenized
    | Studied
    | StudyFailed
)


@dataclass(frozen=True)
class Send:
    """Action: send a message to a peer; tell if it is unreachable."""

    peer: PeerId
    message: ToWorker | ToClient
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Tokenize:
    """Action: turn a prompt into token ids, and be ready to turn its answers into text.

    Attributes:
        num_choices: how many answers.
        stop_strings: the answer ends before the first of these.
    """

    key: RequestKey
    kind: PromptKind
    payload: bytes
    num_choices: int
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class Detokenize:
    """Action: turn the next tokens of an answer into text.

    Attributes:
        choice: which of the ticket's answers.
        last: no more tokens come.
    """

    key: RequestKey
    choice: int
    token_ids: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class Forget:
    """Action: drop what is kept for the text of a request."""

    key: RequestKey


@dataclass(frozen=True)
class Study:
    """Action: answer a question beside the event loop, by `Studied` or `StudyFailed`.

    Planning takes 2 to 200 ms, which no token should wait for.
    """

    question: Question


@dataclass(frozen=True)
class Log:
    """Action: write a line for the operator."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class Stop:
    """Action: end the coordinator; it can never serve this model."""

    error: DistributedLLMError


Action = Send | Tokenize | Detokenize | Forget | Study | Log | Stop
