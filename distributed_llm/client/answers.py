"""Answers as users get them: chunks as they come, and complete ones."""

from dataclasses import dataclass, field

from msgspec import structs

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    Finished,
    FinishReason,
    Spelling,
    StepTrace,
    Timings,
    TokenChunk,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class LikelyToken:
    """A token that is likely at one position of an answer.

    Attributes:
        logprob: natural logarithm of its probability, by the model's logits before any sampling
            parameter.
        text: how it is written in the middle of a text, with U+FFFD for parts of characters; the
            name of a special token; empty if the tokenizer does not know it or there is none.
        bytes: its text in UTF-8, of which several tokens may make one character; None if the text
            is a name, unknown, or longer than 256 bytes, which are shown then.
    """

    token_id: int
    logprob: float
    text: str
    bytes: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class PickedToken(LikelyToken):
    """A token of an answer, and what it was picked from.

    Attributes:
        top: the likeliest tokens in its place, likeliest first; as many as `logprobs` asks for.
    """

    top: tuple[LikelyToken, ...]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A complete answer.

    Attributes:
        text: without special tokens; ends before a stop string.
        token_ids: token ids of the answer, without the prompt.
        finish_reason: "stop" (end-of-sequence token, stop token or stop string) or "length".
        stop_string: the stop string that ended the answer; None if none did.
        choice: index of the answer, of the `n` to its prompt.
        logprobs: one per token id if `logprobs` was asked for, else None.
        usage: token counts of this answer; the prompt and what was found of it in the KV cache
            count for each of the request's `n` answers.
        timings: how long the request took.
        request_id: id of the request.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_string: str | None = None
    choice: int
    logprobs: list[PickedToken] | None
    usage: Usage
    timings: Timings
    request_id: str


@dataclass(frozen=True)
class Chunk:
    """The next piece of an answer.

    In a stream of `n` answers, chunks of all answers are mixed, those of each answer in order. The
    stream ends with one chunk per answer, by `choice`, that has only `generation`.

    Attributes:
        text: complete characters; empty while one is unfinished.
        token_ids: tokens of this answer since its last chunk.
        choice: index of the answer, of the request's `n`.
        logprobs: one per token id if `logprobs` was asked for, else None.
        finish_reason: in the last chunk with text, why the answer ends; see `Generation`.
        stop_string: in that chunk, the stop string that ended the answer; None if none did.
        trace: the steps that led to its tokens, oldest first, if `trace` was asked for: which
            machines computed what, and how long that took. With a prompt of many steps, some come
            in chunks before the first token.
        generation: the complete answer, in its last chunk only.
    """

    text: str
    token_ids: list[int]
    choice: int = 0
    logprobs: list[PickedToken] | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    trace: tuple[StepTrace, ...] = ()
    generation: Generation | None = None


class Answers:
    """Assembles the answers of one request from the coordinator's messages, and checks them.

    Args:
        params: the parameters that the request was sent with.
    """

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self._request_id = request_id
        self._with_logprobs = params.logprobs is not None
        self._answers = [_Answer() for _ in range(params.n)]

    def add(self, piece: TokenChunk) -> Chunk:
        """Add a piece to its answer; return it as a chunk for the user.

        Raises:
            RemoteProtocolError: the piece does not continue its answer.
        """
        answer = self._continued(piece)
        picked = list(map(_picked, piece.token_ids, piece.logprobs))
        answer.texts.append(piece.text)
        answer.token_ids += piece.token_ids
        answer.logprobs += picked
        answer.finish_reason, answer.stop_string = piece.finish_reason, piece.stop_string
        return Chunk(
            text=piece.text,
            token_ids=list(piece.token_ids),
            choice=piece.choice,
            logprobs=picked if self._with_logprobs else None,
            finish_reason=piece.finish_reason,
            stop_string=piece.stop_string,
            trace=piece.trace,
        )

    def finish(self, end: Finished) -> list[Generation]:
        """Return the complete answers, by choice.

        Raises:
            RemoteProtocolError: not all of them have ended.
        """
        return [self._generation(choice, end) for choice in range(len(self._answers))]

    def _continued(self, piece: TokenChunk) -> "_Answer":
        if piece.choice >= len(self._answers):
            raise _bad(f"choice {piece.choice} was not asked for")
        answer = self._answers[piece.choice]
        if answer.finish_reason:
            raise _bad(f"choice {piece.choice} goes on after its end")
        come = len(answer.token_ids)
        if piece.index != come:
            raise _bad(
                f"choice {piece.choice} goes on at token {piece.index}, but {come} have come"
            )
        expected = len(piece.token_ids) if self._with_logprobs else 0
        if len(piece.logprobs) != expected:
            raise _bad(f"{len(piece.logprobs)} log-probabilities where {expected} belong")
        return answer

    def _generation(self, choice: int, end: Finished) -> Generation:
        answer = self._answers[choice]
        if answer.finish_reason is None:
            raise _bad(f"choice {choice} has no end")
        return Generation(
            text="".join(answer.texts),
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            stop_string=answer.stop_string,
            choice=choice,
            logprobs=answer.logprobs if self._with_logprobs else None,
            usage=structs.replace(end.usage, completion_tokens=len(answer.token_ids)),
            timings=end.timings,
            request_id=self._request_id,
        )


@dataclass
class _Answer:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PickedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None


def _picked(token_id: int, one: TokenLogprobs) -> PickedToken:
    first, *others = one.spelled or (None,) * (1 + len(one.top))
    if len(others) != len(one.top):
        raise _bad(f"{len(one.spelled)} spellings where {1 + len(one.top)} tokens are")
    text, raw = _read(first)
    return PickedToken(
        token_id=token_id,
        logprob=one.logprob,
        text=text,
        bytes=raw,
        top=tuple(
            _likely(likely, logprob, spelling)
            for (likely, logprob), spelling in zip(one.top, others, strict=True)
        ),
    )


def _likely(token_id: int, logprob: float, spelling: Spelling | None) -> LikelyToken:
    text, raw = _read(spelling)
    return LikelyToken(token_id=token_id, logprob=logprob, text=text, bytes=raw)


def _read(spelling: Spelling | None) -> tuple[str, tuple[int, ...] | None]:
    """Return text and bytes of a token."""
    if spelling is None:
        return "", None
    text = spelling.written.decode(errors="replace")
    return text, tuple(spelling.written) if spelling.is_text else None


def _bad(what: str) -> RemoteProtocolError:
    return RemoteProtocolError("bad_answer", f"{what}. The coordinator is in error; ask again.")
