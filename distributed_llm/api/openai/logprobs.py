"""Log-probabilities, as chats and as completions tell them. Pure."""

from collections.abc import Sequence

import msgspec

from distributed_llm.client.answers import LikelyToken, PickedToken


class TokenLogprob(msgspec.Struct):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None


class PickedLogprob(TokenLogprob):
    """A token of an answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """The tokens of a chat's answer, or of a piece of it."""

    content: list[PickedLogprob]
    refusal: None = None


def chat_logprobs(tokens: Sequence[PickedToken]) -> ChatLogprobs:
    """Return tokens as chats tell them."""
    return ChatLogprobs(
        [
            PickedLogprob(
                token.text,
                token.logprob,
                token.bytes,
                [TokenLogprob(one.text, one.logprob, one.bytes) for one in token.top],
            )
            for token in tokens
        ]
    )


class CompletionLogprobs(msgspec.Struct):
    """The tokens of a completion, or of a piece of it.

    Attributes:
        text_offset: characters of the completion before each token.
        top_logprobs: the likeliest tokens in each place, and the one that was picked.
    """

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]

    def extend(self, more: "CompletionLogprobs") -> None:
        """Add those of the next piece."""
        self.text_offset += more.text_offset
        self.token_logprobs += more.token_logprobs
        self.tokens += more.tokens
        self.top_logprobs += more.top_logprobs


def completion_logprobs(tokens: Sequence[PickedToken], begins_at: int) -> CompletionLogprobs:
    """Return tokens as completions tell them.

    Args:
        begins_at: characters of the completion before the first of them.
    """
    offsets, at = [], begins_at
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[token.logprob for token in tokens],
        tokens=[token.text for token in tokens],
        top_logprobs=[_by_text((*token.top, token)) for token in tokens],
    )


def _by_text(tokens: Sequence[LikelyToken]) -> dict[str, float]:
    """Return log-probabilities by texts; of several tokens with a text that of the likeliest."""
    found: dict[str, float] = {}
    for token in tokens:
        found.setdefault(token.text, token.logprob)
    return found
