"""The answers that wait for a pipeline: their order, and those that none has room for now. Pure.

An answer that may take more KV cache than any serving pipeline has is set aside, so that nobody
waits behind it, and comes back to its place once there is one with enough.
"""

from collections.abc import Hashable, Iterator

from distributed_llm.coordinator.requests.fairness import FairQueue
from distributed_llm.coordinator.requests.request import Answer


class WaitingAnswers:
    """The answers that wait for a pipeline, in an order that is fair among their clients."""

    def __init__(self) -> None:
        self._queue: FairQueue[Answer] = FairQueue()
        self._set_aside: dict[Answer, float] = {}  # since when, clock seconds

    def __len__(self) -> int:
        return len(self._queue) + len(self._set_aside)

    def __iter__(self) -> Iterator[Answer]:
        """Iterate over all of them, in no particular order."""
        yield from self._queue
        yield from self._set_aside

    def add(self, answer: Answer) -> None:
        """Let an answer wait, before younger ones of its client."""
        self._queue.add(answer.request.client, answer, order=answer.number)

    def next(self, room_tokens: int, *, now: float) -> Answer | None:
        """Return the answer that is next of those that take so much at most, or None.

        Answers before it that may take more are set aside until more is asked for.

        Args:
            room_tokens: positions that one answer may take on some pipeline that serves.
        """
        for answer in [a for a in self._set_aside if a.request.reserved_tokens <= room_tokens]:
            del self._set_aside[answer]
            self.add(answer)
        while (first := self._queue.first()) is not None:
            if first.request.reserved_tokens <= room_tokens:
                return first
            self._set_aside[self._queue.pop()] = now
        return None

    def set_aside_since(self, most_tokens: int) -> float | None:
        """Return since when answers of at most `most_tokens` are set aside, clock seconds."""
        since = (
            at for a, at in self._set_aside.items() if a.request.reserved_tokens <= most_tokens
        )
        return min(since, default=None)

    def first(self) -> Answer:
        """Return the answer that `next` returned.

        Raises:
            IndexError: it returned none.
        """
        first = self._queue.first()
        if first is None:
            raise IndexError("no answer is next")
        return first

    def take(self) -> Answer:
        """Remove and return the answer that `next` returned, and count its tokens as served.

        Raises:
            IndexError: it returned none.
        """
        answer = self._queue.pop()
        self.served(answer, len(answer.token_ids))
        return answer

    def remove(self, answer: Answer) -> None:
        """Let an answer wait no more."""
        if self._set_aside.pop(answer, None) is None:
            self._queue.remove(answer.request.client, answer)

    def served(self, answer: Answer, num_tokens: int) -> None:
        """Count tokens that the client of an answer got, or is about to."""
        self._queue.charge(answer.request.client, num_tokens)

    def forget(self, client: Hashable) -> None:
        """Forget what a client was served that has nothing waiting or running any more."""
        self._queue.forget(client)

    @property
    def clients(self) -> set[Hashable]:
        """Clients of whom it is known what they were served."""
        return self._queue.clients

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._queue.validate()
        assert not self._set_aside.keys() & set(self._queue)
