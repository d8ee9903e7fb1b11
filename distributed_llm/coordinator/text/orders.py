"""What the text process was asked, and what it has to know again should it die. Pure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from distributed_llm.common.errors import DistributedLLMError, error_from_wire
from distributed_llm.common.tensors import token_ids_of_frame
from distributed_llm.coordinator.events import (
    AskText,
    Detokenize,
    Detokenized,
    Forget,
    RequestKey,
    TextAnswered,
    TextFailed,
    TextRules,
    Tokenize,
    Tokenized,
)
from distributed_llm.coordinator.text.messages import (
    Answered,
    AnswerTokens,
    Begun,
    Drop,
    Encoded,
    Failed,
    Order,
    Prompt,
    Question,
    Resume,
    Texts,
    Tokens,
)

TextEvent = Tokenized | TextFailed | Detokenized | TextAnswered


@dataclass
class _Request:
    """A request that has not ended, or a question.

    Attributes:
        prompt: its order, until it is encoded; a question is its order.
        begun: whether the text process has begun to encode it.
        answers: token ids of each answer whose text was made.
    """

    key: RequestKey
    prompt: Prompt | Question | None
    rules: TextRules = field(default_factory=TextRules)
    answers: list[list[int]] = field(default_factory=list)
    begun: bool = False
    context: tuple[int, ...] = field(default=())


class TextOrders:
    """Turns actions into orders, replies into events, and remembers both for a new text process.

    After a death, requests that it worked on have failed: those whose prompt it had begun, and
    those in the step whose text it was making. All others go on as if nothing had happened.
    """

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}
        self._steps: deque[Tokens] = deque()  # without a reply, oldest first

    @property
    def steps_wait(self) -> bool:
        """Whether the tokens of a step were sent whose text has not come."""
        return bool(self._steps)

    def prompt(self, action: Tokenize) -> Order:
        """Return the order to encode a prompt."""
        number = action.key[2]
        order = Prompt(
            request=number,
            kind=action.kind,
            payload=action.payload,
            num_choices=action.num_choices,
            rules=action.rules,
        )
        answers: list[list[int]] = [[] for _ in range(action.num_choices)]
        self._requests[number] = _Request(action.key, order, action.rules, answers)
        return order

    def question(self, action: AskText) -> Order:
        """Return the order to answer a question."""
        number = action.key[2]
        order = Question(
            request=number, kind=action.kind, payload=action.payload, special=action.special
        )
        self._requests[number] = _Request(action.key, order)
        return order

    def tokens(self, actions: Sequence[Detokenize]) -> Order:
        """Return the order to turn the tokens of a step into text."""
        step = Tokens(
            answers=tuple(
                AnswerTokens(
                    action.key[2], action.choice, action.token_ids, action.last, action.spell
                )
                for action in actions
            )
        )
        self._steps.append(step)
        return step

    def forget(self, action: Forget) -> Order | None:
        """Return the order to forget a request; None if there is nothing to forget."""
        number = action.key[2]
        return Drop(request=number) if self._requests.pop(number, None) else None

    def replied(self, reply: Begun | Encoded | Answered | Failed | Texts) -> list[TextEvent]:
        """Take a reply of the text process; return what it means."""
        match reply:
            case Begun():
                if request := self._requests.get(reply.request):
                    request.begun = True
                return []
            case Encoded():
                return self._encoded(reply)
            case Answered():
                request = self._requests.pop(reply.request, None)
                return [TextAnswered(request.key, reply.payload)] if request else []
            case Failed():
                return self._failed(reply)
            case Texts():
                return self._texts(reply)

    def died(self, error: DistributedLLMError) -> list[TextEvent]:
        """Give up the requests that the text process worked on when it died.

        Args:
            error: what they are told.
        """
        lost = {number for number, request in self._requests.items() if request.begun}
        if self._steps:
            lost |= {tokens.request for tokens in self._steps.popleft().answers}
        return self._give_up(lost, error)

    def give_up_all(self, error: DistributedLLMError) -> list[TextEvent]:
        """Give up all requests: there is no text process that could go on with them."""
        self._steps.clear()
        return self._give_up(set(self._requests), error)

    def again(self) -> list[Order]:
        """Return all that a new text process has to be told."""
        orders: list[Order] = []
        for number, request in self._requests.items():
            orders.append(
                request.prompt
                or Resume(
                    request=number,
                    rules=request.rules,
                    context=request.context,
                    answers=tuple(map(tuple, request.answers)),
                )
            )
        return [*orders, *self._steps]

    def _give_up(self, numbers: set[int], error: DistributedLLMError) -> list[TextEvent]:
        lost = [self._requests.pop(number, None) for number in sorted(numbers)]
        return [TextFailed(request.key, error) for request in lost if request]

    def _encoded(self, reply: Encoded) -> list[TextEvent]:
        request = self._requests.get(reply.request)
        if request is None:
            return []
        request.prompt, request.begun, request.context = None, False, reply.context
        token_ids = token_ids_of_frame(reply.token_ids)
        return [Tokenized(request.key, token_ids, reply.mask, reply.first)]

    def _failed(self, reply: Failed) -> list[TextEvent]:
        request = self._requests.pop(reply.request, None)
        if request is None:
            return []
        return [TextFailed(request.key, error_from_wire(reply.code, reply.message, 0.0))]

    def _texts(self, reply: Texts) -> list[TextEvent]:
        for tokens in self._steps.popleft().answers:
            if request := self._requests.get(tokens.request):
                request.answers[tokens.choice] += tokens.token_ids
        events: list[TextEvent] = [
            Detokenized(
                self._requests[piece.request].key,
                piece.choice,
                piece.text,
                piece.num_tokens,
                piece.stop_string,
                piece.last,
                piece.spelled,
                piece.mask,
                piece.complete,
            )
            for piece in reply.pieces
            if piece.request in self._requests
        ]
        for failure in reply.failures:
            events += self._failed(failure)
        return events
