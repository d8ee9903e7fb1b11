"""Questions about text: what are its token ids, what is the text of token ids? Pure.

The text process answers them, one at a time: it encodes two prompts at once, so that however many
questions there are, and however long, prompts of requests go on. Clients take turns: whoever has
asked least, in bytes, is next.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from distributed_llm.common.errors import DistributedLLMError, Overloaded, RequestCancelled
from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.messages import (
    DecodeTokens,
    EncodePrompt,
    PromptEncoded,
    RequestId,
    TokensDecoded,
)
from distributed_llm.common.tensors import ITEM_BYTES, Frame, TensorSpec
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import (
    Action,
    AskText,
    RequestKey,
    Send,
    TextAnswered,
    TextFailed,
)
from distributed_llm.coordinator.requests.failures import failure
from distributed_llm.coordinator.requests.fairness import FairQueue
from distributed_llm.coordinator.requests.parameters import wrong_prompt

_RETRY_S = 1.0
"""When to ask again who was refused, seconds: most questions take less than a millisecond."""


@dataclass(eq=False)
class _Question:
    """A question that its client still waits for.

    Attributes:
        client: among whom service is fair.
        encodes: whether token ids are asked for, rather than a text.
    """

    ask: AskText
    client: Hashable
    encodes: bool


class TextQuestions:
    """The questions of all clients about text.

    Args:
        context_length: tokens that the model can take; what is certainly far longer is refused.
        max_waiting: questions that may wait; one that would exceed it is refused.
        draw_number: returns a number that no other request and no question has.
    """

    def __init__(
        self, context_length: int, *, max_waiting: int, draw_number: Callable[[], int]
    ) -> None:
        self._context_length = context_length
        self._max_waiting = max_waiting
        self._draw_number = draw_number
        self._questions: dict[PeerId, dict[RequestId, _Question]] = {}
        self._open: Counter[Hashable] = Counter()  # questions, by their client
        self._queue: FairQueue[_Question] = FairQueue()
        self._asked: RequestKey | None = None  # in the text process, perhaps for nobody any more

    def has(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether the client at `peer` waits for the answer to a question with this id."""
        return request_id in self._questions.get(peer, ())

    def is_asked(self, key: RequestKey) -> bool:
        """Return whether the text process has a question with this key."""
        return key == self._asked

    def ask(
        self,
        peer: PeerId,
        message: EncodePrompt | DecodeTokens,
        frames: tuple[Frame, ...],
        *,
        holder: PublicKey = NOBODY,
    ) -> list[Action]:
        """Accept or refuse a new question.

        Args:
            frames: as `message.tensors` describes them.
            holder: key of the client; `NOBODY` without keys.
        """
        encodes = isinstance(message, EncodePrompt)
        kind = message.prompt if isinstance(message, EncodePrompt) else "token_ids"
        if len(self._queue) >= self._max_waiting:
            error: DistributedLLMError = Overloaded(
                f"{len(self._queue)} questions about text wait already, and the limit is "
                f"{self._max_waiting}. Ask again later, or raise max_waiting_requests.",
                retry_after_s=_RETRY_S,
            )
            return [failure(peer, message.request_id, error)]
        if wrong := wrong_prompt(kind, message.tensors, self._context_length):
            return [failure(peer, message.request_id, wrong)]
        key = (peer, message.request_id, self._draw_number())
        payload = bytes(frames[0]) if frames else b""
        special = (
            message.add_special_tokens
            if isinstance(message, EncodePrompt)
            else not message.skip_special_tokens
        )
        question = _Question(AskText(key, kind, payload, special), holder or peer, encodes)
        self._questions.setdefault(peer, {})[message.request_id] = question
        self._open[question.client] += 1
        self._queue.add(question.client, question, order=key[2])
        return self._next()

    def cancel(self, peer: PeerId, request_id: RequestId) -> list[Action]:
        """End a question because its client asked for that."""
        question = self._questions.get(peer, {}).get(request_id)
        if question is None:
            return []
        self._retire(question)
        return [failure(peer, request_id, RequestCancelled("The request was cancelled."))]

    def drop_client(self, peer: PeerId) -> None:
        """End all questions of a client that is gone."""
        for question in list(self._questions.get(peer, {}).values()):
            self._retire(question)

    def answered(self, event: TextAnswered | TextFailed) -> list[Action]:
        """Tell the client what the text process says; ask the next question."""
        assert event.key == self._asked
        self._asked = None
        actions: list[Action] = []
        peer, request_id, _ = event.key
        question = self._questions.get(peer, {}).get(request_id)
        if question is not None and question.ask.key == event.key:
            self._retire(question)
            if isinstance(event, TextFailed):
                actions.append(failure(peer, request_id, event.error))
            else:
                actions.append(_answer(question, event.payload))
        return actions + self._next()

    def _next(self) -> list[Action]:
        if self._asked is not None or not len(self._queue):
            return []
        question = self._queue.pop()
        self._queue.charge(question.client, 1 + len(question.ask.payload))
        self._asked = question.ask.key
        return [question.ask]

    def _retire(self, question: _Question) -> None:
        peer, request_id, _ = question.ask.key
        del self._questions[peer][request_id]
        if not self._questions[peer]:
            del self._questions[peer]
        self._queue.remove(question.client, question)
        self._open[question.client] -= 1
        if not self._open[question.client]:
            del self._open[question.client]
            self._queue.forget(question.client)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._queue.validate()
        questions = [q for own in self._questions.values() for q in own.values()]
        assert self._open == Counter(question.client for question in questions)
        assert {q for q in questions if q.ask.key != self._asked} == set(self._queue)
        assert self._asked is not None or not questions
        assert len(self._queue) <= self._max_waiting


def _answer(question: _Question, payload: bytes) -> Send:
    peer, request_id, _ = question.ask.key
    frames = (payload,) if payload else ()
    if question.encodes:
        specs = (TensorSpec("int32", (len(payload) // ITEM_BYTES["int32"],)),)
        return Send(
            peer, PromptEncoded(request_id=request_id, tensors=specs if frames else ()), frames
        )
    specs = (TensorSpec("uint8", (len(payload),)),)
    return Send(peer, TokensDecoded(request_id=request_id, tensors=specs if frames else ()), frames)
