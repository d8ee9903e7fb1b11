"""The messages that carry a piece of an answer, each within the limits of the wire. Pure."""

from collections.abc import Iterator

import msgspec

from distributed_llm.common.messages import TokenChunk

_MAX_CHARS = 8192
"""Characters of text in one message: at most 32 KiB in UTF-8."""

_MAX_TOKENS = 4
"""Tokens in one message: with 20 log-probabilities for each, and how those tokens are written, at
most 24 KiB."""


_MAX_HOPS = 16
"""Stages in one message that has text and tokens too: at most 5 KiB. A message that has only them
has those of one step."""


def messages_of(piece: TokenChunk) -> Iterator[TokenChunk]:
    """Yield the messages that together say what `piece` does, in their order.

    It is nearly always one. A vocabulary may have tokens of any length, though, and a text that was
    held back for a stop string comes at once.
    """
    if sum(len(step.hops) for step in piece.trace) > _MAX_HOPS:
        for step in piece.trace:
            yield TokenChunk(
                request_id=piece.request_id,
                choice=piece.choice,
                index=piece.index,
                text="",
                token_ids=(),
                trace=(step,),
            )
        piece = msgspec.structs.replace(piece, trace=())
    texts, tokens = len(piece.text), len(piece.token_ids)
    count = max(1, -(-texts // _MAX_CHARS), -(-tokens // _MAX_TOKENS))
    if count == 1:
        yield piece
        return
    for number in range(count):
        first, text = number * _MAX_TOKENS, number * _MAX_CHARS
        yield msgspec.structs.replace(
            piece,
            index=piece.index + min(first, tokens),
            text=piece.text[text : text + _MAX_CHARS],
            token_ids=piece.token_ids[first : first + _MAX_TOKENS],
            logprobs=piece.logprobs[first : first + _MAX_TOKENS],
            finish_reason=piece.finish_reason if number == count - 1 else None,
            stop_string=piece.stop_string if number == count - 1 else None,
            trace=() if number else piece.trace,
        )
