"""Answers of `/v1/completions`: whole, or written in chunks. Pure."""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from distributed_llm.api.openai.answer_head import AnswerHead
from distributed_llm.api.openai.logprobs import CompletionLogprobs, completion_logprobs
from distributed_llm.api.openai.tracing import Hop, hops_of
from distributed_llm.api.openai.usage import UsageBody, usage_of
from distributed_llm.api.streaming import DONE, sse
from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.common.messages import Timings

Piece = tuple[int, Chunk]
"""A chunk, and the number of the prompt that it answers."""


class CompletionChoice(msgspec.Struct, kw_only=True):
    """An answer, or the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionChunk(msgspec.Struct, kw_only=True):
    """An event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | UnsetType | None = UNSET
    dllm_hops: list[Hop] | UnsetType = UNSET
    dllm_timings: Timings | UnsetType = UNSET


class Choices:
    """Makes choices of chunks.

    Args:
        n: answers to each prompt.
        echoes: texts with which the answers to each prompt begin.
    """

    def __init__(self, n: int, echoes: Sequence[str], *, with_trace: bool) -> None:
        self._n = n
        self._with_trace = with_trace
        self._echoes = {
            prompt * n + choice: echo
            for prompt, echo in enumerate(echoes)
            for choice in range(n)
            if echo
        }
        self._lengths = [0] * (n * len(echoes))
        self._ended: list[list[Generation]] = [[] for _ in echoes]

    def add(self, piece: Piece) -> CompletionChoice | None:
        """Return what a chunk adds to its answer; None if that is nothing."""
        prompt, chunk = piece
        if chunk.generation is not None:
            self._ended[prompt].append(chunk.generation)
            return None
        index = prompt * self._n + chunk.choice
        text = self._echoes.pop(index, "") + chunk.text if self._echoes else chunk.text
        if not (text or chunk.logprobs or chunk.finish_reason or chunk.trace):
            return None
        choice = CompletionChoice(index=index, text=text, finish_reason=chunk.finish_reason)
        if chunk.logprobs is not None:
            choice.logprobs = completion_logprobs(chunk.logprobs, self._lengths[index])
            self._lengths[index] += len(text)
        return choice

    @property
    def usage(self) -> UsageBody:
        """Token counts, once all is complete."""
        return usage_of(self._ended)

    @property
    def timings(self) -> Timings | UnsetType:
        """How long the first prompt took, if it is to be told."""
        return self._ended[0][0].timings if self._with_trace else UNSET


class CompletionStream:
    """Writes pieces as server-sent events.

    Args:
        with_usage: tell the token counts at the end.
    """

    def __init__(self, head: AnswerHead, choices: Choices, *, with_usage: bool) -> None:
        self._head = head
        self._choices = choices
        self._with_usage = with_usage

    def write(self, piece: Piece) -> bytes:
        """Return what to send for a piece; maybe nothing."""
        choice = self._choices.add(piece)
        if choice is None:
            return b""
        chunk = self._chunk([choice], None if self._with_usage else UNSET)
        chunk.dllm_hops = hops_of(piece[1].trace) or UNSET
        return sse(chunk)

    def end(self) -> bytes:
        """Return what to send at the end."""
        timings = self._choices.timings
        if not self._with_usage and timings is UNSET:
            return DONE
        last = self._chunk([], self._choices.usage if self._with_usage else UNSET)
        last.dllm_timings = timings
        return sse(last) + DONE

    def _chunk(
        self, choices: list[CompletionChoice], usage: UsageBody | UnsetType | None
    ) -> CompletionChunk:
        head = self._head
        return CompletionChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.fingerprint,
            choices=choices,
            usage=usage,
        )


def whole_completion(
    pieces: Iterable[Piece], head: AnswerHead, choices: Choices
) -> CompletionChunk:
    """Return the body of answers that are sent at once."""
    found: dict[int, CompletionChoice] = {}
    texts: dict[int, list[str]] = {}
    for piece in pieces:
        more = choices.add(piece)
        if more is None:
            continue
        whole = found.setdefault(more.index, more)
        texts.setdefault(more.index, []).append(more.text)
        whole.finish_reason = more.finish_reason
        if whole is not more and whole.logprobs and more.logprobs:
            whole.logprobs.extend(more.logprobs)
    for index, whole in found.items():
        whole.text = "".join(texts[index])
    return CompletionChunk(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=[whole for _, whole in sorted(found.items())],
        usage=choices.usage,
        dllm_timings=choices.timings,
    )
