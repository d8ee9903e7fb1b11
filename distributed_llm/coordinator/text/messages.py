"""Messages between the coordinator and its text process. Pure.

They travel in msgpack over a socket that only these two have. Requests go by their numbers.
"""

from typing import Any

import msgspec

from distributed_llm.common.messages import Spelling
from distributed_llm.common.types import TokenId
from distributed_llm.coordinator.events import PromptKind, TextRules
from distributed_llm.coordinator.model import TokenizerFacts


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of these messages."""


class Prompt(_Message, frozen=True, kw_only=True):
    """Order: turn a prompt into token ids; see `events.Tokenize`."""

    request: int
    kind: PromptKind
    payload: bytes
    num_choices: int
    rules: TextRules


class Question(_Message, frozen=True, kw_only=True):
    """Order: turn a prompt into token ids, or token ids into text; see `events.AskText`."""

    request: int
    kind: PromptKind
    payload: bytes
    special: bool


class AnswerTokens(msgspec.Struct, frozen=True, array_like=True):
    """The next tokens of an answer, which become text; see `events.Detokenize`."""

    request: int
    choice: int
    token_ids: tuple[TokenId, ...]
    last: bool
    spell: tuple[TokenId, ...] = ()


class Tokens(_Message, frozen=True, kw_only=True):
    """Order: turn the tokens of a step into text; answered by `Texts`."""

    answers: tuple[AnswerTokens, ...]


class Resume(_Message, frozen=True, kw_only=True):
    """Order: go on with a request that an earlier text process had.

    Attributes:
        context: the end of the text that its answers continue, token ids.
        answers: token ids of each answer whose text was made.
    """

    request: int
    rules: TextRules
    context: tuple[TokenId, ...]
    answers: tuple[tuple[TokenId, ...], ...]


class Drop(_Message, frozen=True, kw_only=True):
    """Order: forget a request."""

    request: int


class Ready(_Message, frozen=True, kw_only=True):
    """Reply: the tokenizer is loaded."""

    facts: TokenizerFacts


class Unusable(_Message, frozen=True, kw_only=True):
    """Reply: the tokenizer cannot be loaded, and the text process ends."""

    code: str
    message: str


class Begun(_Message, frozen=True, kw_only=True):
    """Reply: a prompt is being turned into token ids now; `Encoded` or `Failed` follows.

    So it is with a question, which `Answered` or `Failed` follows.

    Attributes:
        num_bytes: size of the prompt.
    """

    request: int
    num_bytes: int


class Encoded(_Message, frozen=True, kw_only=True):
    """Reply: the token ids of a prompt.

    Attributes:
        token_ids: int32 in the byte order of this machine.
        context: its last tokens if answers continue its text, else nothing.
        mask, first: see `events.Tokenized`.
    """

    request: int
    token_ids: bytes
    context: tuple[TokenId, ...]
    mask: bytes = b""
    first: TokenId | None = None


class Answered(_Message, frozen=True, kw_only=True):
    """Reply: the answer to a question; see `events.TextAnswered`."""

    request: int
    payload: bytes


class Failed(_Message, frozen=True, kw_only=True):
    """Reply: a prompt or answer of a request cannot be dealt with.

    Attributes:
        code: `code` of the exception in `common.errors`.
    """

    request: int
    code: str
    message: str


class AnswerText(msgspec.Struct, frozen=True, array_like=True):
    """The text that the next tokens of an answer add; see `events.Detokenized`."""

    request: int
    choice: int
    text: str
    num_tokens: int
    stop_string: str | None
    last: bool
    spelled: tuple[Spelling | None, ...] = ()
    mask: bytes = b""
    complete: bool = False


class Texts(_Message, frozen=True, kw_only=True):
    """Reply: texts of a step, of those of its requests that have not ended."""

    pieces: tuple[AnswerText, ...]
    failures: tuple[Failed, ...] = ()


Order = Prompt | Question | Tokens | Resume | Drop
Reply = Ready | Unusable | Begun | Encoded | Answered | Failed | Texts

_HEADER_BYTES = 8
"""Bytes before each message that say how many it has, big-endian."""

_encoder = msgspec.msgpack.Encoder()


def pack(message: Order | Reply) -> bytes:
    """Return a message as bytes with its length before them."""
    data = _encoder.encode(message)
    return len(data).to_bytes(_HEADER_BYTES, "big") + data


class Unpacker:
    """Cuts a stream of bytes into the messages that were packed.

    Args:
        union: the messages of one direction.
    """

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)
        self._received = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Return the messages that are complete with these bytes.

        Raises:
            ValueError: they are none, which is a bug.
        """
        self._received += data
        messages = []
        at = 0
        while len(self._received) >= at + _HEADER_BYTES:
            start = at + _HEADER_BYTES
            end = start + int.from_bytes(self._received[at:start], "big")
            if len(self._received) < end:
                break
            with memoryview(self._received) as view, view[start:end] as message:
                messages.append(self._decoder.decode(message))
            at = end
        del self._received[:at]
        return messages
