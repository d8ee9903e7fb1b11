"""The scheduler of one pipeline: which requests compute how many tokens in the next step. Pure.

A step decodes one token of some requests and fills the rest of its token budget with prefill
chunks, shared out equally among clients, so that a long prompt holds nobody up. Decoding requests
are spread over the steps in flight; each is in at most one of them, because its next token depends
on its last. The chunks of one prompt may follow each other through the stages in several steps.

A request is admitted when the KV cache has room for its prompt. When answers outgrow the room, the
prefixes of ended sequences are freed first; then the youngest request is preempted: it gives up its
KV cache and computes it again later. The oldest request always goes on. A request whose beginning
is in the KV cache of another sequence shares it, and one whose beginning is being computed for
another request waits for that.
"""

from collections.abc import Callable, Iterable, Iterator

from distributed_llm.common.messages import MAX_SLICES, SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.requests.fairness import shared_out
from distributed_llm.coordinator.requests.lifecycle import RequestCause, RequestState
from distributed_llm.coordinator.requests.request import Request
from distributed_llm.coordinator.serving.kv_ledger import KVLedger, Match, common_prefix
from distributed_llm.coordinator.serving.step import Step

_WORTH_WAITING = 64
"""Positions that must be shared for a request to wait until another one has computed them."""

_MAX_SAMPLING_BYTES = 40_000
"""Sampling parameters in one step, bytes; the header of its task may have 64 KiB."""


class Scheduler:
    """The running requests of one pipeline, and their KV cache.

    Args:
        max_sequences: requests that may run at the same time.
        max_tokens: token budget of one step.
        kv_tokens: positions of KV cache that every stage has room for.
        new_sequence_id: returns ids that are never used twice.

    Attributes:
        on_change: called when a step may be begun, or a request admitted, that could not before.
    """

    def __init__(
        self,
        *,
        max_sequences: int,
        max_tokens: int,
        kv_tokens: int,
        new_sequence_id: Callable[[], SequenceId],
        on_change: Callable[[], None],
    ) -> None:
        self.on_change = on_change
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._kv_tokens = kv_tokens
        self._new_sequence_id = new_sequence_id
        self._ledger = KVLedger(kv_tokens)
        self._running: dict[int, Request] = {}  # by number, in the order of admission
        self._followers: dict[Request, list[Request]] = {}  # by the request they wait for
        self._in_flight: dict[SequenceId, int] = {}  # number of steps in flight, by sequence
        self._leaving: dict[SequenceId, bool] = {}  # to end after these steps; whether to keep
        self._preempted: list[Request] = []
        self._prefix_hit_tokens = 0

    @property
    def running(self) -> Iterable[Request]:
        """The running requests, in the order of admission."""
        return self._running.values()

    @property
    def num_running(self) -> int:
        """Number of running requests."""
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        """Running requests whose prompt is computed."""
        return sum([len(r.token_ids) - r.num_computed_tokens <= 1 for r in self.running])

    @property
    def kv_tokens_used(self) -> int:
        """Positions of KV cache that running requests take."""
        return self._ledger.used_tokens - self._ledger.cached_tokens

    @property
    def kv_tokens_cached(self) -> int:
        """Positions of KV cache that prefixes of ended sequences take."""
        return self._ledger.cached_tokens

    def take_freed(self) -> list[SequenceId]:
        """Return the sequences that every stage is to free, and forget them."""
        return self._ledger.take_freed()

    def take_preempted(self) -> list[Request]:
        """Return the requests that were preempted since the last call."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def take_prefix_hit_tokens(self) -> int:
        """Return how many positions since the last call were shared instead of computed."""
        tokens, self._prefix_hit_tokens = self._prefix_hit_tokens, 0
        return tokens

    # -------------------------------------------------------------- requests

    def admit(self, request: Request, *, now: float) -> bool:
        """Let a request run, if there is room for it; return whether it runs."""
        if not self.has_seat or request.ticket.reserved_tokens > self._kv_tokens:
            return False
        leader, common = self._leader(request)
        if leader is not None:
            request.waits_for, request.waits_until = leader, common
            self._followers.setdefault(leader, []).append(request)
        elif not self._open(request):
            return False
        request.change(RequestCause.ADMITTED)
        request.started_at = now if request.started_at is None else request.started_at
        self._running[request.number] = request
        self.on_change()
        return True

    @property
    def has_seat(self) -> bool:
        """Whether fewer than `max_sequences` requests run."""
        return len(self._running) < self._max_sequences

    def may_hit(self, key: int) -> bool:
        """Return, at less cost than `hit_length`, whether that may be above 0.

        Args:
            key: `prefix_key` of the request's tokens.
        """
        return self._ledger.may_match(key)

    def hit_length(self, request: Request) -> int:
        """Return how many positions a request would share instead of computing them."""
        match = self._match(request)
        return match.length if match else 0

    def remove(self, request: Request, *, keep: bool = False) -> None:
        """Stop running a request, if it runs.

        Args:
            keep: keep its KV cache as a prefix for other requests.
        """
        if self._running.pop(request.number, None) is not None:
            self.on_change()
            self._close(request, keep=keep)
            self._forget_waiting(request)

    def restart(self, request: Request) -> None:
        """Compute all tokens of a running request again: a stage has lost positions of it.

        The prefix that it shares may be lost too; it is no longer kept, and the request shares
        none.
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
        """Remove and return all requests, ready to run on another pipeline; this one is gone."""
        requests = list(self._running.values())
        self._running.clear()
        self._followers.clear()
        for request in requests:
            request.reset()
            request.change(RequestCause.PIPELINE_GONE)
        return requests

    def move(self, kv_tokens: int) -> None:
        """Continue on other stages that hold the same KV cache; no step is in flight.

        Sampling parameters are sent again. If more positions are in use than there is room for,
        prefixes of ended sequences are freed, then the youngest requests preempted.

        Args:
            kv_tokens: positions that every new stage has room for.
        """
        for request in self._running.values():
            request.sampling_sent = False
        while not self.resize(kv_tokens):
            holding = [r for r in self._running.values() if r.sequence_id is not None]
            self._preempt(max(holding, key=lambda r: r.number))

    def resize(self, kv_tokens: int) -> bool:
        """Set the room of the KV cache; return whether no more positions than that are in use.

        Prefixes of ended sequences are freed as needed.
        """
        self._kv_tokens = kv_tokens
        self.on_change()
        return self._ledger.resize(kv_tokens)

    def trim(self, cached_tokens: int) -> None:
        """Free prefixes of ended sequences until they take at most `cached_tokens` positions.

        The least recently used go first.
        """
        self._ledger.trim(cached_tokens)
        self.on_change()

    def _open(self, request: Request) -> bool:
        """Begin a request's sequence, if there is room for its tokens and one more."""
        sequence_id, length = self._new_sequence_id(), len(request.token_ids) + 1
        match = self._match(request) if request.shares else None
        # A shared prefix keeps the whole other sequence in memory; without it there may be room.
        choices = (match, None) if match else (None,)
        if not any(
            self._ledger.open(sequence_id, request.token_ids, length, choice) for choice in choices
        ):
            return False
        request.sequence_id, request.prefix = sequence_id, self._ledger.prefix_of(sequence_id)
        if request.prefix:
            request.num_computed_tokens = request.num_scheduled_tokens = request.prefix.length
            request.num_cached_tokens = max(request.num_cached_tokens, request.prefix.length)
            self._prefix_hit_tokens += request.prefix.length
        return True

    def _match(self, request: Request) -> Match | None:
        # At least one token is left to compute: the next one is sampled from its logits.
        return self._ledger.match(request.token_ids, len(request.token_ids) - 1)

    def _leader(self, request: Request) -> tuple[Request | None, int]:
        """Return a request that computes a prefix worth waiting for, and the prefix's length."""
        best, length = None, 0
        if request.shares:
            limit = len(request.token_ids) - 1
            length = max(self.hit_length(request), _WORTH_WAITING - 1)
            for other in self._running.values():
                if other.waits_for is None and other.num_uncomputed_tokens > 1:
                    common = common_prefix(other.token_ids, request.token_ids, limit)
                    if common > length:
                        best, length = other, common
        return best, length

    def _forget_waiting(self, request: Request) -> None:
        """Let a request that runs no longer wait for nobody, and nobody for it."""
        if request.waits_for is not None:
            self._followers[request.waits_for].remove(request)
            request.waits_for = None
        self._release_followers(request, everybody=True)

    def _release_followers(self, leader: Request, *, everybody: bool = False) -> None:
        """Let the followers go on whose prefix `leader` has computed, or all of them."""
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
        request.change(RequestCause.PREEMPTED)
        self._preempted.append(request)
        self.on_change()

    def _close(self, request: Request, *, keep: bool) -> None:
        """End a request's sequence as soon as no step in flight computes it."""
        sequence_id, request.sequence_id = request.sequence_id, None
        if sequence_id is None:
            return
        if sequence_id in self._in_flight:
            self._leaving[sequence_id] = keep
        else:
            self._ledger.end(sequence_id, keep=keep)

    # -------------------------------------------------------------- steps

    def next_step(self, *, max_decodes: int, prompts: bool, idle: bool) -> Step | None:
        """Return the next step, which is in flight from now on; None if no request is ready.

        Args:
            max_decodes: requests that may decode in it.
            prompts: whether it may have prefill chunks.
            idle: whether no step is in flight; a suspected request runs only then, alone.
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
        """Yield slices within the budgets: decoding requests first, then prefill chunks."""
        budget, room = self._max_tokens, _MAX_SAMPLING_BYTES
        decodes = min(max_decodes, budget, MAX_SLICES)
        count, unread = 0, []
        for request in list(candidates):
            if request.sequence_id is None:  # it follows another, or was preempted in this loop
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
        """Make room for a request's next token, preempting others if need be; return whether."""
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
        """Return which request to preempt for `request`; None: wait until steps have ended."""
        holding = [r for r in self._running.values() if r.sequence_id is not None]
        younger = [r for r in holding if r.number > request.number and not r.num_in_flight]
        if younger:
            return max(younger, key=lambda r: r.number)
        if self._in_flight:
            return None
        if len(holding) == 1:
            # It is alone and has no room: its shared prefix keeps more than it uses itself.
            request.shares = False
        return request

    def complete(self, step: Step) -> list[bool]:
        """Take a step that all stages have run; return whether each sampled token is current.

        A token is not current if its request has been restarted or has ended since.
        A request that got a token is cleared of suspicion; after a prefill chunk it is not, because
        what breaks the stages may be in a later chunk.
        """
        counts = []
        for request, part in zip(step.requests, step.slices, strict=True):
            current = request.sequence_id == part.sequence_id
            if current:
                request.num_in_flight -= 1
                request.num_computed_tokens = part.start + part.num_tokens
                self._ledger.computed(part.sequence_id, request.num_computed_tokens)
                if part.sample:
                    request.clear_suspicion()
                if request in self._followers:
                    self._release_followers(request)
            self._landed(part.sequence_id)
            if part.sample:
                counts.append(current)
        return counts

    def abandon(self, step: Step) -> None:
        """Take a step that will never end: its requests go back to what is computed."""
        for request, part in zip(step.requests, step.slices, strict=True):
            if request.sequence_id == part.sequence_id:
                request.num_in_flight -= 1
                request.num_scheduled_tokens = request.num_computed_tokens
                request.sampling_sent = False
            self._landed(part.sequence_id)

    def _landed(self, sequence_id: SequenceId) -> None:
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
            assert request.state is RequestState.RUNNING
            assert (request.sequence_id is None) == (request.waits_for is not None)
            in_flight = request.sequence_id is not None and self._in_flight.get(request.sequence_id)
            assert request.num_in_flight == (in_flight or 0)
            assert 0 <= request.num_computed_tokens <= request.num_scheduled_tokens
            assert request.num_scheduled_tokens <= len(request.token_ids)
            assert request.num_in_flight or request.num_computed_tokens < len(request.token_ids)
            leader = request.waits_for
            assert leader is None or leader.number in self._running
            assert leader is None or request in self._followers[leader]
