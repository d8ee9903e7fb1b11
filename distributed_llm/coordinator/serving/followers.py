"""Answers that wait until another one has computed the beginning that both have. Pure."""

from collections.abc import Iterable

from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.answer_sequences import AnswerSequences
from distributed_llm.coordinator.serving.prefix_index import common_prefix

_WORTH_WAITING = 64
"""Least length of a prefix, in positions, for which an answer waits until another computed it."""


class Followers:
    """Who waits for whom; none of them has a sequence.

    Args:
        sequences: of those that do not wait.
    """

    def __init__(self, sequences: AnswerSequences) -> None:
        self._sequences = sequences
        self._of: dict[Answer, list[Answer]] = {}  # by the answer they wait for

    def leader_for(self, answer: Answer, running: Iterable[Answer]) -> tuple[Answer | None, int]:
        """Return who computes the longest beginning that is worth waiting for, and its length.

        If it begins like none of them, or already shares as much, that is None.
        """
        best, length = None, 0
        if answer.shares:
            limit = len(answer.token_ids) - 1
            length = max(self._sequences.hit_length(answer), _WORTH_WAITING - 1)
            for other in running:
                if other.request.shares_with != answer.request.shares_with:
                    continue
                if other.waits_for is None and other.num_uncomputed_tokens > 1:
                    common = common_prefix(other.token_ids, answer.token_ids, limit)
                    if common > length and self._sequences.may_go_on_from(other, common):
                        best, length = other, common
        return best, length

    def add(self, answer: Answer, leader: Answer, length: int) -> None:
        """Have an answer wait until `leader` has computed `length` positions."""
        answer.waits_for, answer.waits_until = leader, length
        self._of.setdefault(leader, []).append(answer)

    def remove(self, answer: Answer) -> None:
        """Have an answer wait for none, if it does."""
        if answer.waits_for is not None:
            self._of[answer.waits_for].remove(answer)
            answer.waits_for = None

    def take_ready(self, leader: Answer, *, everyone: bool) -> list[Answer]:
        """Return those whose beginning `leader` has computed, or all; they wait no more."""
        waiting = self._of.pop(leader, [])
        ready = [a for a in waiting if everyone or leader.num_computed_tokens >= a.waits_until]
        if len(ready) < len(waiting):
            self._of[leader] = [answer for answer in waiting if answer not in ready]
        for answer in ready:
            answer.waits_for = None
        return ready

    def awaited(self, leader: Answer) -> set[int]:
        """Return the lengths that others wait for `leader` to compute."""
        return {answer.waits_until for answer in self._of.get(leader, ())}

    def clear(self) -> None:
        """Forget all, who are no longer to run here."""
        self._of.clear()

    def validate(self, answer: Answer) -> None:
        """Assert that an answer waits if, and only if, it is known here."""
        leaders = [leader for leader, waiting in self._of.items() if answer in waiting]
        assert leaders == ([] if answer.waits_for is None else [answer.waits_for])
