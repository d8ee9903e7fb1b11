"""Which sequences compute how many tokens in the next step. Pure.

First come, first served: a request is admitted when the KV cache has room for its prompt and its
longest answer. Every step takes one token of each running sequence and fills the rest of its
token budget with chunks of prompts, so that a long prompt never stops those that are answering.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.coordinator.requests import Phase, Request

MAX_SLICES = 224
"""Sequences in one task: slices of the longest kind, that many, fit into a message's header."""


@dataclass(frozen=True)
class Step:
    """One pass of a batch through all stages.

    Attributes:
        requests: one per slice, in the same order.
        token_ids: of all slices, packed.
    """

    requests: tuple[Request, ...]
    slices: tuple[SequenceSlice, ...]
    token_ids: tuple[int, ...]

    @property
    def sampling(self) -> tuple[Request, ...]:
        """The requests that get a token from this step, in the order of the last stage's answer."""
        return tuple(
            request
            for request, part in zip(self.requests, self.slices, strict=True)
            if part.sampling is not None
        )


class Scheduler:
    """Requests that wait and requests that run.

    Args:
        max_sequences: in one step; no more than `MAX_SLICES`.
        max_tokens: in one step.
    """

    def __init__(self, *, max_sequences: int, max_tokens: int) -> None:
        self._max_sequences = min(max_sequences, MAX_SLICES)
        self._max_tokens = max_tokens
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._kv_tokens = 0

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests without KV cache, oldest first."""
        return self._waiting

    @property
    def running(self) -> Sequence[Request]:
        """Requests with KV cache, oldest first."""
        return self._running

    def set_capacity(self, kv_tokens: int) -> None:
        """A new plan is served: it has room for `kv_tokens` positions, and all of it is free.

        Every running request computes all its tokens again; those that no longer fit wait.
        """
        self._kv_tokens = kv_tokens
        everyone = sorted(self._running + self._waiting, key=lambda r: r.sequence_id)
        for request in everyone:
            restart(request)
            request.phase = Phase.WAITING
        self._running = []
        self._waiting = everyone

    def add(self, request: Request) -> None:
        """Queue a request whose prompt is known."""
        self._waiting.append(request)

    def remove(self, request: Request) -> bool:
        """Forget a request; return whether stages may hold KV cache of it."""
        if request in self._running:
            self._running.remove(request)
            return True
        if request in self._waiting:
            self._waiting.remove(request)
        return False

    def next_step(self, *, now: float) -> Step | None:
        """Return what to compute next, or None if nothing is ready; marks it in flight."""
        self._admit(now)
        ready = [r for r in self._running if not r.in_flight]
        suspects = [r for r in ready if r.alone]
        parts = list(self._fill(suspects[:1] or ready))
        if not parts:
            return None
        for request, _ in parts:
            request.in_flight = True
        return Step(
            requests=tuple(request for request, _ in parts),
            slices=tuple(part for _, part in parts),
            token_ids=tuple(
                token
                for request, part in parts
                for token in request.token_ids[part.start : part.start + part.num_tokens]
            ),
        )

    def complete(self, step: Step) -> None:
        """A step ran through all stages: its tokens are in their KV caches.

        A request that got a token is cleared of suspicion. One that only went through a part of its
        prompt is not: what breaks stages may be in a later part.
        """
        for request, part in zip(step.requests, step.slices, strict=True):
            request.in_flight = False
            if part.sampling is not None:
                request.alone = False
                request.losses = request.failures = 0
            request.num_computed_tokens = part.start + part.num_tokens

    def abandon(self, step: Step) -> None:
        """A step did not run through all stages; its sequences are ready for another."""
        for request in step.requests:
            request.in_flight = False

    def _admit(self, now: float) -> None:
        reserved = sum(r.reserved_tokens for r in self._running)
        while self._waiting and len(self._running) < self._max_sequences:
            request = self._waiting[0]
            reserved += request.reserved_tokens
            if reserved > self._kv_tokens:
                return
            request.phase = Phase.RUNNING
            request.started_at = now if request.started_at is None else request.started_at
            self._running.append(self._waiting.pop(0))

    def _fill(self, ready: Sequence[Request]) -> Iterator[tuple[Request, SequenceSlice]]:
        """Yield slices within the budget: sequences that answer first, then prompts by age."""
        budget = self._max_tokens
        for request in sorted(ready, key=lambda r: _missing(r) > 1):
            size = min(_missing(request), budget)
            if size == 0:
                continue
            budget -= size
            last = size == _missing(request)
            yield (
                request,
                SequenceSlice(
                    sequence_id=request.sequence_id,
                    start=request.num_computed_tokens,
                    num_tokens=size,
                    sampling=request.next_sampling() if last else None,
                ),
            )

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert sum(r.reserved_tokens for r in self._running) <= self._kv_tokens or not self._running
        assert len(self._running) <= self._max_sequences
        assert all(r.phase in (Phase.RUNNING, Phase.CLOSING) for r in self._running)
        assert all(r.phase is Phase.WAITING and not r.in_flight for r in self._waiting)
        for request in self._running:
            assert 0 <= request.num_computed_tokens < len(request.token_ids)


def restart(request: Request) -> None:
    """Make a request compute all its tokens again; no token of its answer changes."""
    request.num_computed_tokens = 0
    request.in_flight = False


def _missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens
