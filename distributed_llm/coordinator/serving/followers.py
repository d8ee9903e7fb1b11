"""Answers that wait until another one has computed the beginning that both have. Pure."""

from distributed_llm.coordinator.requests.request import Answer


class Followers:
    """Who waits for whom; none of them has a sequence."""

    def __init__(self) -> None:
        self._of: dict[Answer, list[Answer]] = {}  # by the answer they wait for

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
