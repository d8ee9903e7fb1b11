"""Which sequences of one pipeline compute how many tokens in the next step. Pure.

Every step takes one token of each of its running sequences and fills the rest of its token budget
with chunks of prompts, the same for each client, so that a long prompt stops nobody. Running
sequences are spread over the steps in flight: a sequence that answers is in one of them, for its
next token depends on the last; a prompt's chunks may follow each other through the stages.

A request is admitted when its prompt finds room in the KV cache. When answers outgrow the room,
prefixes kept for later go first, then the youngest request gives its KV cache up and computes it
again later; the oldest always goes on. What a request begins alike with another, it shares.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from distributed_llm.common.messages import MAX_SLICES, SequenceSlice
from distributed_llm.coordinator.requests.fairness import shared_out
from distributed_llm.coordinator.requests.request import Phase, Request
from distributed_llm.coordinator.serving.kv_ledger import KVLedger, Match, common_prefix

_WORTH_WAITING = 64
"""Positions; to share so many, a request waits until another one has computed them."""

_MAX_SAMPLING_BYTES = 40_000
"""Of one step; a message's header has 64 KiB."""


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
    def num_samples(self) -> int:
        """How many tokens the last stage answers with."""
        return sum(part.sample for part in self.slices)

    @property
    def decodes(self) -> bool:
        """Whether each sequence computes a single token."""
        return len(self.token_ids) == len(self.slices)


class Scheduler:
    """The requests that run on one pipeline.

    Args:
        max_sequences: that run at the same time.
        max_tokens: in one step.
        kv_tokens: positions of KV cache that all stages have room for.
        new_sequence_id: names that are never used twice.
        on_change: called when steps may be begun, or requests admitted, that could not before.

    Attributes:
        preempted: requests that gave up their KV cache; whoever reads it empties it.
        prefix_hit_tokens: positions not computed because they were there; read like that, too.
    """

    def __init__(
        self,
        *,
        max_sequences: int,
        max_tokens: int,
        kv_tokens: int,
        new_sequence_id: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        self.on_change = on_change
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._kv_tokens = kv_tokens
        self._new_sequence_id = new_sequence_id
        self._ledger = KVLedger(kv_tokens)
        self._running: dict[int, Request] = {}  # by number, in the order of admission
        self._followers: dict[Request, list[Request]] = {}  # who waits for whom
        self._in_flight: dict[int, int] = {}  # steps under way, by sequence
        self._leaving: dict[int, bool] = {}  # sequences to end then; whether to keep them
        self.preempted: list[Request] = []
        self.prefix_hit_tokens = 0

    @property
    def running(self) -> Iterable[Request]:
        """Requests that were admitted, oldest first."""
        return self._running.values()

    @property
    def num_running(self) -> int:
        """How many they are."""
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        """How many of them compute one token at a time."""
        return sum([len(r.token_ids) - r.num_computed_tokens <= 1 for r in self.running])

    @property
    def kv_tokens_used(self) -> int:
        """Positions of KV cache that running requests take."""
        return self._ledger.used_tokens - self._ledger.cached_tokens

    @property
    def kv_tokens_cached(self) -> int:
        """Positions of KV cache that prefixes kept for later take."""
        return self._ledger.cached_tokens

    def take_freed(self) -> list[int]:
        """Return the sequences whose KV cache is to be freed on every stage, once."""
        freed, self._ledger.freed = self._ledger.freed, []
        return freed

    # -------------------------------------------------------------- who comes and goes

    def admit(self, request: Request, *, now: float) -> bool:
        """Let a request run; return False if there is no room for it now."""
        if not self.has_seat or request.ticket.reserved_tokens > self._kv_tokens:
            return False
        leader, common = self._leader(request)
        if leader is not None:
            request.waits_for, request.waits_until = leader, common
            self._followers.setdefault(leader, []).append(request)
        elif not self._open(request):
            return False
        request.phase = Phase.RUNNING
        request.started_at = now if request.started_at is None else request.started_at
        self._running[request.number] = request
        self.on_change()
        return True

    @property
    def has_seat(self) -> bool:
        """Whether another request may run, if there is room in the KV cache."""
        return len(self._running) < self._max_sequences

    def may_hit(self, key: int) -> bool:
        """Return whether `hit_length` may be above 0 for tokens with this `prefix_key`; quickly."""
        return self._ledger.may_match(key)

    def hit_length(self, request: Request) -> int:
        """Return how many positions a request would find computed here."""
        match = self._match(request)
        return match.length if match else 0

    def remove(self, request: Request, *, keep: bool = False) -> None:
        """A request runs no longer; its KV cache may be kept as a prefix for others."""
        if self._running.pop(request.number, None) is not None:
            self.on_change()
            self._close(request, keep=keep)
            self._forget_waiting(request)

    def restart(self, request: Request) -> None:
        """A stage lost positions of a running request: compute all its tokens again.

        No token of its answer changes. What it began as may be lost as well, and is kept no longer.
        """
        prefix = request.prefix
        self._close(request, keep=False)
        if prefix and request.num_computed_tokens == prefix.length:
            self._ledger.discard(prefix.sequence_id)
        request.shares = False
        request.reset()
        if not self._open(request):
            self._preempt(request)

    def evacuate(self) -> list[Request]:
        """Return all requests, ready to run elsewhere: the pipeline is no more."""
        requests = list(self._running.values())
        self._running.clear()
        self._followers.clear()
        for request in requests:
            request.reset()
            request.phase = Phase.WAITING
        return requests

    def move(self, kv_tokens: int) -> None:
        """Go on with other stages that hold the same KV cache; no step is under way.

        How to sample is to be told again. Where there is less room than is used, prefixes kept for
        later go first, then the youngest requests give their KV cache up.

        Args:
            kv_tokens: positions that all of the new stages have room for.
        """
        for request in self._running.values():
            request.sampling_sent = False
        while not self.resize(kv_tokens):
            holding = [r for r in self._running.values() if r.sequence_id is not None]
            self._preempt(max(holding, key=lambda r: r.number))

    def resize(self, kv_tokens: int) -> bool:
        """Have room for so many positions; return whether no more than that are in use.

        Prefixes kept for later make room.
        """
        self._kv_tokens = kv_tokens
        self.on_change()
        return self._ledger.resize(kv_tokens)

    def trim(self, cached_tokens: int) -> None:
        """Keep no more than so many positions of prefixes for later, those used last."""
        self._ledger.trim(cached_tokens)
        self.on_change()

    def _open(self, request: Request) -> bool:
        """Give a request room for all tokens that it has, and for the next one."""
        sequence_id, length = self._new_sequence_id(), len(request.token_ids) + 1
        match = self._match(request) if request.shares else None
        # What is shared keeps all of the other sequence; there may be room without.
        choices = (match, None) if match else (None,)
        if not any(
            self._ledger.open(sequence_id, request.token_ids, length, choice) for choice in choices
        ):
            return False
        request.sequence_id, request.prefix = sequence_id, self._ledger.prefix_of(sequence_id)
        if request.prefix:
            request.num_computed_tokens = request.num_scheduled_tokens = request.prefix.length
            request.num_cached_tokens = max(request.num_cached_tokens, request.prefix.length)
            self.prefix_hit_tokens += request.prefix.length
        return True

    def _match(self, request: Request) -> Match | None:
        # One token at least is computed: the next one is sampled from what it gives.
        return self._ledger.match(request.token_ids, len(request.token_ids) - 1)

    def _leader(self, request: Request) -> tuple[Request | None, int]:
        """Return a request that computes what is worth waiting for, and how many positions."""
        best, length = None, 0
        if request.shares:
            limit = len(request.token_ids) - 1
            length = max(self.hit_length(request), _WORTH_WAITING - 1)
            for other in self._running.values():
                if other.waits_for is None and _missing(other) > 1:
                    common = common_prefix(other.token_ids, request.token_ids, limit)
                    if common > length:
                        best, length = other, common
        return best, length

    def _forget_waiting(self, request: Request) -> None:
        """A request runs no longer: it waits for nobody, and nobody for it."""
        if request.waits_for is not None:
            self._followers[request.waits_for].remove(request)
            request.waits_for = None
        self._release_followers(request, everybody=True)

    def _release_followers(self, leader: Request, *, everybody: bool = False) -> None:
        """Let those go on who waited for what `leader` has computed by now."""
        waiting = self._followers.pop(leader, [])
        for request in waiting:
            if not everybody and leader.num_computed_tokens < request.waits_until:
                self._followers.setdefault(leader, []).append(request)
                continue
            request.waits_for = None
            if not self._open(request):
                self._preempt(request)

    def _preempt(self, request: Request) -> None:
        del self._running[request.number]
        self._close(request, keep=False)
        self._forget_waiting(request)
        request.reset()
        request.phase = Phase.WAITING
        self.preempted.append(request)
        self.on_change()

    def _close(self, request: Request, *, keep: bool) -> None:
        """End a request's sequence, as soon as no step with it is under way."""
        sequence_id, request.sequence_id = request.sequence_id, None
        if sequence_id is None:
            return
        if sequence_id in self._in_flight:
            self._leaving[sequence_id] = keep
        else:
            self._ledger.end(sequence_id, keep=keep)

    # -------------------------------------------------------------- steps

    def next_step(self, *, max_decodes: int, prompts: bool, idle: bool) -> Step | None:
        """Return what to compute next, or None if nothing is ready; it is under way then.

        Args:
            max_decodes: sequences that may compute one token in it.
            prompts: whether chunks of prompts may be in it.
            idle: no other step is under way.
        """
        suspects = [r for r in self._running.values() if r.alone and r.waits_for is None]
        if suspects:
            parts = list(self._fill(suspects[:1], 1, prompts=True)) if idle else []
        else:
            parts = list(self._fill(self._running.values(), max_decodes, prompts=prompts))
        if not parts:
            return None
        return Step(
            requests=tuple(request for request, _ in parts),
            slices=tuple(part for _, part in parts),
            token_ids=tuple(
                token
                for request, part in parts
                for token in request.token_ids[part.start : part.start + part.num_tokens]
            ),
        )

    def _fill(
        self, candidates: Iterable[Request], max_decodes: int, *, prompts: bool
    ) -> Iterator[tuple[Request, SequenceSlice]]:
        """Yield slices within the budgets: sequences that answer first, then prompts by age."""
        budget, room = self._max_tokens, _MAX_SAMPLING_BYTES
        decodes = min(max_decodes, budget, MAX_SLICES)
        count, unread = 0, []
        for request in list(candidates):
            if request.sequence_id is None:  # it waits for another, or was preempted just now
                continue
            missing = len(request.token_ids) - request.num_scheduled_tokens
            if missing > 1:
                unread.append(request)
            elif missing == 1 and count < decodes:
                if room < request.sampling_bytes or not self._grow(request):
                    continue
                count += 1
                budget -= 1
                room -= request.sampling_bytes
                yield request, self._slice(request, 1)
        for request, size in shared_out(unread if prompts else [], budget):
            if count >= MAX_SLICES or room < request.sampling_bytes:
                return
            if request.sequence_id is None:
                continue
            count += 1
            room -= request.sampling_bytes
            yield request, self._slice(request, size)

    def _slice(self, request: Request, size: int) -> SequenceSlice:
        sequence_id, start = request.sequence_id, request.num_scheduled_tokens
        assert sequence_id is not None
        self._in_flight[sequence_id] = self._in_flight.get(sequence_id, 0) + 1
        request.num_in_flight += 1
        request.num_scheduled_tokens = start + size
        sample = request.num_scheduled_tokens == len(request.token_ids)
        sampling = None
        if sample and not request.sampling_sent:
            sampling, request.sampling_sent = request.sampling, True
        prefix = request.prefix
        return SequenceSlice(
            sequence_id=sequence_id,
            start=start,
            num_tokens=size,
            sample=sample,
            sampling=sampling,
            prefix=prefix if prefix and prefix.length == start else None,
        )

    def _grow(self, request: Request) -> bool:
        """Give a request room for its next token, if need be at the cost of younger ones."""
        assert request.sequence_id is not None
        while not self._ledger.extend(request.sequence_id, len(request.token_ids) + 1):
            victim = self._victim(request)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _victim(self, request: Request) -> Request | None:
        """Return who shall give up its KV cache for `request`; None is to wait for steps to end."""
        holding = [r for r in self._running.values() if r.sequence_id is not None]
        younger = [r for r in holding if r.number > request.number and not r.num_in_flight]
        if younger:
            return max(younger, key=lambda r: r.number)
        if self._in_flight:
            return None
        if len(holding) == 1:
            # Alone, and still no room: what it shares keeps more than itself. It starts without.
            request.shares = False
        return request

    def complete(self, step: Step) -> list[bool]:
        """A step ran through all stages: return, by slice that samples, whether its token counts.

        A request that got a token is cleared of suspicion. One that only went through a part of its
        prompt is not: what breaks stages may be in a later part.
        """
        counts = []
        for request, part in zip(step.requests, step.slices, strict=True):
            current = request.sequence_id == part.sequence_id
            if current:
                request.num_in_flight -= 1
                request.num_computed_tokens = part.start + part.num_tokens
                self._ledger.computed(part.sequence_id, request.num_computed_tokens)
                if part.sample:
                    request.clear()
                if request in self._followers:
                    self._release_followers(request)
            self._landed(part.sequence_id)
            if part.sample:
                counts.append(current)
        return counts

    def abandon(self, step: Step) -> None:
        """A step will never run through all stages: its sequences go back to what is computed."""
        for request, part in zip(step.requests, step.slices, strict=True):
            if request.sequence_id == part.sequence_id:
                request.num_in_flight -= 1
                request.num_scheduled_tokens = request.num_computed_tokens
                request.sampling_sent = False
            self._landed(part.sequence_id)

    def _landed(self, sequence_id: int) -> None:
        self.on_change()
        self._in_flight[sequence_id] -= 1
        if not self._in_flight[sequence_id]:
            del self._in_flight[sequence_id]
            if sequence_id in self._leaving:
                self._ledger.end(sequence_id, keep=self._leaving.pop(sequence_id))

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._ledger.validate()
        assert len(self._running) <= self._max_sequences
        held = {r.sequence_id for r in self._running.values() if r.sequence_id is not None}
        assert set(self._leaving) <= set(self._in_flight)
        assert set(self._in_flight) <= held | set(self._leaving)
        for request in self._running.values():
            assert request.phase is Phase.RUNNING
            assert (request.sequence_id is None) == (request.waits_for is not None)
            assert request.num_in_flight == self._in_flight.get(request.sequence_id or -1, 0)
            assert 0 <= request.num_computed_tokens <= request.num_scheduled_tokens
            assert request.num_scheduled_tokens <= len(request.token_ids)
            assert request.num_in_flight or request.num_computed_tokens < len(request.token_ids)
            leader = request.waits_for
            assert leader is None or leader.number in self._running
            assert leader is None or request in self._followers[leader]


def _missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens
