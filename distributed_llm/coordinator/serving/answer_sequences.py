"""The sequences of the answers that run on one pipeline, from their first token to their end. Pure.

An answer has a sequence in the KV cache while it computes, and another one each time it begins
again. Where it begins like another sequence, it shares that one's positions instead of computing
them. A sequence ends as soon as no step in flight computes it: until then stages may still write
to it.
"""

from collections.abc import Callable, Iterable

from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from distributed_llm.coordinator.serving.prefixes import Match
from distributed_llm.coordinator.serving.snapshots import is_wanted, stop_before


class AnswerSequences:
    """The sequences of running answers, and the steps in flight that compute them.

    Args:
        ledger: of the KV cache that they are in.
        new_sequence_id: returns ids that are never used twice.
    """

    def __init__(self, ledger: KVLedger, new_sequence_id: Callable[[], SequenceId]) -> None:
        self._ledger = ledger
        self._new_sequence_id = new_sequence_id
        self._in_flight: dict[SequenceId, int] = {}  # number of steps in flight, by sequence
        self._ending: dict[SequenceId, bool] = {}  # to end after these steps; whether to keep
        self._prefix_tokens = (0, 0)  # looked up, and found

    @property
    def are_computed(self) -> bool:
        """Whether steps in flight compute any of them."""
        return bool(self._in_flight)

    def take_prefix_tokens(self) -> tuple[int, int]:
        """Return how many tokens were looked up among prefixes since the last call, and shared."""
        tokens, self._prefix_tokens = self._prefix_tokens, (0, 0)
        return tokens

    def hit_length(self, answer: Answer) -> int:
        """Return how many positions an answer would share instead of computing them."""
        match = self._match(answer)
        return match.length if match else 0

    def open(self, answer: Answer) -> bool:
        """Begin an answer's sequence; return False without room for its tokens and one more."""
        sequence_id, length = self._new_sequence_id(), len(answer.token_ids) + 1
        match = self._match(answer) if answer.shares else None
        # A shared prefix keeps the whole other sequence in memory; without it there may be room.
        choices = (match, None) if match else (None,)
        if not any(
            self._ledger.open(
                sequence_id, answer.token_ids, length, choice, answer.request.shares_with
            )
            for choice in choices
        ):
            return False
        answer.sequence_id, answer.prefix = sequence_id, self._ledger.prefix_of(sequence_id)
        queried, hit = self._prefix_tokens
        found = answer.prefix.length if answer.prefix else 0
        self._prefix_tokens = (queried + len(answer.token_ids), hit + found)
        if answer.prefix:
            answer.num_computed_tokens = answer.num_scheduled_tokens = answer.prefix.length
            answer.num_cached_tokens = max(answer.num_cached_tokens, answer.prefix.length)
        return True

    def _match(self, answer: Answer) -> Match | None:
        # At least one token is left to compute: the next one is sampled from its logits.
        return self._ledger.match(
            answer.token_ids, len(answer.token_ids) - 1, answer.request.shares_with
        )

    def close(self, answer: Answer, *, keep: bool) -> None:
        """End an answer's sequence, if it has one, as soon as no step in flight computes it.

        Args:
            keep: keep it as a prefix for other answers.
        """
        sequence_id, answer.sequence_id = answer.sequence_id, None
        if sequence_id is None:
            return
        if sequence_id in self._in_flight:
            self._ending[sequence_id] = keep
        else:
            self._ledger.end(sequence_id, keep=keep)

    def close_lost(self, answer: Answer) -> None:
        """End an answer's sequence, of which a stage has lost positions.

        The prefix that it shares may be lost too; it is no longer kept.
        """
        prefix = answer.prefix
        self.close(answer, keep=False)
        if prefix and answer.num_computed_tokens == prefix.length:
            self._ledger.discard(prefix.sequence_id)

    # -------------------------------------------------------------- steps

    def step_began(self, sequence_id: SequenceId) -> None:
        """Count one more step in flight that computes a sequence."""
        self._in_flight[sequence_id] = self._in_flight.get(sequence_id, 0) + 1

    def step_ended(self, sequence_id: SequenceId) -> None:
        """Count one step less that computes a sequence, and end that if it is to."""
        self._in_flight[sequence_id] -= 1
        if not self._in_flight[sequence_id]:
            del self._in_flight[sequence_id]
            if sequence_id in self._ending:
                self._ledger.end(sequence_id, keep=self._ending.pop(sequence_id))

    # -------------------------------------------------------------- states of layers

    def may_go_on_from(self, answer: Answer, position: int) -> bool:
        """Return whether others can go on from where `answer` is after so many positions.

        In layers with a state of their own, they can if one is kept there, or can be.
        """
        if not self._ledger.keeps_states or position > answer.num_scheduled_tokens:
            return True
        assert answer.sequence_id is not None
        return self._ledger.has_snapshot(answer.sequence_id, position)

    def until_snapshot(self, answer: Answer, size: int, awaited: Iterable[int]) -> int:
        """Return how many of the next `size` positions of a prompt to compute in one step.

        Args:
            answer: whose prompt it is.
            size: positions that the step has room for.
            awaited: positions that other answers wait for.
        """
        if not self._ledger.keeps_states:
            return size
        start = answer.num_scheduled_tokens
        return stop_before(start, start + size, len(answer.token_ids), awaited) - start

    def keep_snapshot(self, answer: Answer, stop: int, awaited: Iterable[int]) -> bool:
        """Return whether states are kept after `stop` positions of a prompt, and charge them.

        Args:
            answer: whose prompt it is.
            stop: positions that are computed by then.
            awaited: positions that other answers wait for.
        """
        if not self._ledger.keeps_states:
            return False
        assert answer.sequence_id is not None
        latest = self._ledger.latest_snapshot(answer.sequence_id)
        wanted = is_wanted(stop, len(answer.token_ids), awaited, latest)
        return wanted and self._ledger.keep_snapshot(answer.sequence_id, stop)

    def validate(self, running: Iterable[Answer]) -> None:
        """Assert the invariants; tests call this after every step."""
        steps = {a.sequence_id: a.num_in_flight for a in running if a.sequence_id is not None}
        assert set(self._ending) <= set(self._in_flight)
        assert set(self._in_flight) <= steps.keys() | set(self._ending)
        for sequence_id, count in steps.items():
            assert count == self._in_flight.get(sequence_id, 0)
