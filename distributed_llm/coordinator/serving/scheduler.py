"""The scheduler of one pipeline: which answers compute how many tokens in the next step. Pure.

A step decodes one token of some answers and fills the rest of its token budget with prefill
chunks, shared out equally among clients, so that a long prompt holds nobody up. Decoding answers
are spread over the steps in flight; each is in at most one of them, because its next token depends
on its last. Where not all fit a step, those go first whose latest token is longest ago, and a
quarter of the budget is left to prompts, so that nobody starves. The chunks of one prompt may
follow each other through the stages in several steps.

An answer is admitted when the KV cache has room for its prompt. When answers outgrow the room, the
prefixes of ended sequences are freed first; then the youngest answer is preempted: it gives up its
KV cache and computes it again later. The oldest answer always goes on. An answer whose beginning
is in the KV cache of another sequence shares it, and one whose beginning is being computed for
another answer waits until it can share that.

Layers with a state of their own go on only from where one is kept: the latest and the one before,
and snapshots (`snapshots.py`). So no sequence of theirs is in two steps at once; whatever is lost,
computing goes on from the one or the other.

The source of an encoder-decoder is read as a whole, in a step that computes nothing but sources.
Where answers are ready too, such steps take turns with those that decode.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from distributed_llm.common.messages import MAX_SLICES, SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.requests.answer_states import AnswerCause, AnswerState
from distributed_llm.coordinator.requests.fairness import shared_out
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.answer_sequences import AnswerSequences
from distributed_llm.coordinator.serving.followers import Followers
from distributed_llm.coordinator.serving.kv_ledger import KVLedger
from distributed_llm.coordinator.serving.state_counts import StateCounts
from distributed_llm.coordinator.serving.step import FloatVector, Step

_PROMPT_SHARE = 4
"""Decoding answers leave one in so many tokens of a step to prefill chunks, if there are any."""

MAX_SAMPLING_BYTES = 40_000
"""Sampling parameters in one step, bytes; the header of its task may have 64 KiB."""


class Scheduler:
    """The running answers of one pipeline, and their KV cache.

    Args:
        max_sequences: answers that may run at the same time.
        max_tokens: token budget of one step.
        kv_tokens: positions of KV cache that every stage has room for.
        windows: of the layers.
        new_sequence_id: returns ids that are never used twice.

    Attributes:
        on_change: called when a step may be begun, or an answer admitted, that could not before.
    """

    def __init__(
        self,
        *,
        max_sequences: int,
        max_tokens: int,
        kv_tokens: int,
        windows: KVWindows | None = None,
        new_sequence_id: Callable[[], SequenceId],
        on_change: Callable[[], None],
    ) -> None:
        self.on_change = on_change
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._windows = windows or KVWindows()
        self._longest = self._windows.longest(kv_tokens)
        self._ledger = KVLedger(kv_tokens, self._windows)
        self._sequences = AnswerSequences(self._ledger, new_sequence_id)
        self._running: dict[int, Answer] = {}  # by number, in the order of admission
        self._followers = Followers(self._sequences)
        self._preempted: list[Answer] = []
        self._refused: tuple[Answer | None, int] = (None, 0)  # last, and what room there was
        self._num_slices = 0
        self._read_sources = False  # whether the latest step did

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache that one answer may reserve at most; fewer while layers move."""
        return self._longest

    @property
    def running(self) -> Iterable[Answer]:
        """The running answers, in the order of admission."""
        return self._running.values()

    @property
    def num_running(self) -> int:
        """Number of running answers."""
        return len(self._running)

    @property
    def waits_for_masks(self) -> bool:
        """Whether no answer can run before it is known which token may be its next."""
        return all(answer.waits_for_mask for answer in self.running if answer.waits_for is None)

    @property
    def num_decoding(self) -> int:
        """Running answers whose prompt is computed."""
        return sum([len(a.token_ids) - a.num_computed_tokens <= 1 for a in self.running])

    @property
    def kv_tokens_used(self) -> int:
        """Positions of KV cache that running answers take."""
        return self._ledger.used_tokens - self._ledger.cached_tokens

    def needed_tokens(self, windows: KVWindows) -> int:
        """Return the positions of capacity that running answers take in a plan with `windows`."""
        return self._ledger.needed_tokens(windows)

    @property
    def kv_tokens_cached(self) -> int:
        """Positions of KV cache that prefixes of ended sequences take."""
        return self._ledger.cached_tokens

    @property
    def states(self) -> StateCounts:
        """How many states its sequences keep, where layers have one of their own."""
        return self._ledger.states

    @property
    def were_set_back(self) -> list[SequenceId]:
        """Sequences of which some stages are to go on from where the latest step began."""
        return self._ledger.were_set_back

    def take_freed(self) -> list[SequenceId]:
        """Return the sequences that every stage is to free, and forget them."""
        return self._ledger.take_freed()

    def take_dropped(self) -> dict[SequenceId, int]:
        """Return from which positions on sequences are seen in layers with a window; forget it."""
        return self._ledger.take_dropped()

    def take_preempted(self) -> list[Answer]:
        """Return the answers that were preempted since the last call."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def take_prefix_tokens(self) -> tuple[int, int]:
        """Return how many tokens were looked up among prefixes since the last call, and shared."""
        return self._sequences.take_prefix_tokens()

    # -------------------------------------------------------------- answers

    def admit(self, answer: Answer, *, now: float) -> bool:
        """Let an answer run, if there is room for it; return whether it runs."""
        if not self.has_seat or answer.request.reserved_tokens > self._longest:
            return False
        room = self._ledger.room_tokens
        refused, refused_room = self._refused
        if answer is refused and room <= refused_room:
            return False  # to look for prefixes of a long prompt takes milliseconds
        leader, common = self._followers.leader_for(answer, self.running)
        if leader is not None:
            self._followers.add(answer, leader, common)
        elif not self._sequences.open(answer):
            self._refused = answer, room
            return False
        answer.change(AnswerCause.ADMITTED)
        answer.started_at = now if answer.started_at is None else answer.started_at
        self._running[answer.number] = answer
        self.on_change()
        return True

    @property
    def has_seat(self) -> bool:
        """Whether fewer than `max_sequences` answers run."""
        return len(self._running) < self._max_sequences

    def may_hit(self, key: int) -> bool:
        """Return whether `hit_length` may be above 0, at less cost than asking it.

        Args:
            key: `prefix_key` of the answer's tokens.
        """
        return self._ledger.may_match(key)

    def hit_length(self, answer: Answer) -> int:
        """Return how many positions an answer would share instead of computing them."""
        return self._sequences.hit_length(answer)

    def remove(self, answer: Answer, *, keep: bool = False) -> None:
        """Stop running an answer, if it runs.

        Args:
            keep: keep its KV cache as a prefix for other answers.
        """
        if self._running.pop(answer.number, None) is not None:
            self.on_change()
            self._sequences.close(answer, keep=keep)
            self._forget_waiting(answer)

    def restart(self, answer: Answer) -> None:
        """Compute all tokens of a running answer again: a stage has lost positions of it.

        The prefix that it shares may be lost too; it is no longer kept, and the answer shares
        none.
        """
        self._sequences.close_lost(answer)
        answer.shares = False
        answer.reset()
        if not self._sequences.open(answer):
            self._preempt(answer)

    def evacuate(self) -> list[Answer]:
        """Remove all answers, as the pipeline is given up; return them, ready to run on another."""
        answers = list(self._running.values())
        self._running.clear()
        self._followers.clear()
        for answer in answers:
            answer.reset()
            answer.change(AnswerCause.PIPELINE_GONE)
        return answers

    def move(self, kv_tokens: int, windows: KVWindows | None = None) -> None:
        """Continue on other stages that hold the same KV cache; no step is in flight.

        Sampling parameters are sent again. If more positions are in use than there is room for,
        prefixes of ended sequences are freed, then the youngest answers preempted.

        Args:
            kv_tokens: positions that every new stage has room for.
            windows: of the layers, as the new stages have them.
        """
        for answer in self._running.values():
            answer.sampling_sent = False
        self._windows = windows or self._windows
        while not self.resize(kv_tokens):
            self._preempt(max(self._holding(), key=lambda answer: answer.number))

    def resize(self, kv_tokens: int) -> bool:
        """Set the room of the KV cache; return whether no more positions than that are in use.

        Prefixes of ended sequences are freed as needed.
        """
        self._longest = self._windows.longest(kv_tokens)
        self.on_change()
        return self._ledger.resize(kv_tokens, self._windows)

    def trim(self, cached_tokens: int) -> None:
        """Free prefixes of ended sequences until they take at most `cached_tokens` positions.

        The least recently used go first.
        """
        self._ledger.trim(cached_tokens)
        self.on_change()

    def _forget_waiting(self, answer: Answer) -> None:
        """Have an answer that no longer runs wait for none, and none wait for it."""
        self._followers.remove(answer)
        self._release_followers(answer, everyone=True)

    def _release_followers(self, leader: Answer, *, everyone: bool = False) -> None:
        """Let the followers go on whose prefix `leader` has computed, or all of them."""
        for answer in self._followers.take_ready(leader, everyone=everyone):
            if not self._sequences.open(answer):
                self._preempt(answer)

    def _preempt(self, answer: Answer) -> None:
        del self._running[answer.number]
        self._sequences.close(answer, keep=False)
        self._forget_waiting(answer)
        answer.reset()
        answer.change(AnswerCause.PREEMPTED)
        self._preempted.append(answer)
        self.on_change()

    def _holding(self) -> list[Answer]:
        """Return the running answers that have KV cache."""
        return [answer for answer in self._running.values() if answer.sequence_id is not None]

    # -------------------------------------------------------------- steps

    def next_step(self, *, max_decodes: int, prompts: bool, idle: bool) -> Step | None:
        """Return the next step, which is in flight from now on; None if no answer is ready.

        Args:
            max_decodes: answers that may decode in it.
            prompts: whether it may have prefill chunks.
            idle: whether no step is in flight; suspected answers run only then, one group at a
                time.
        """
        alone = bool(self._windows.state)
        candidates = [
            answer
            for answer in self._running.values()
            if not answer.waits_for_mask and not (alone and answer.num_in_flight)
            if not answer.waits_for_source
        ]
        suspects = [a for a in candidates if a.suspects and a.waits_for is None]
        if suspects:
            group = [answer for answer in suspects if answer.suspects is suspects[0].suspects]
            parts = list(self._fill(group, max(1, max_decodes), prompts=True)) if idle else []
        else:
            parts = list(self._fill(candidates, max_decodes, prompts=prompts))
        if not parts:
            return None
        self._read_sources = parts[0][1].is_source
        return Step(
            answers=tuple(answer for answer, _ in parts),
            slices=tuple(part for _, part in parts),
            token_ids=tuple(
                token
                for answer, part in parts
                for token in answer.token_ids[part.start : part.start + part.num_tokens]
            ),
            masks=tuple(answer.mask for answer, part in parts if part.masked and answer.mask),
        )

    def _fill(
        self, candidates: Collection[Answer], max_decodes: int, *, prompts: bool
    ) -> Iterator[tuple[Answer, SequenceSlice]]:
        """Yield slices within the budgets: of answers, or of sources where it is their turn."""
        sources = [a for a in _unread(candidates) if a.reads_source] if prompts else []
        if sources and not self._read_sources:
            yield from self._fill_sources(sources)
            return
        others = [answer for answer in candidates if not answer.reads_source]
        none = True
        for filled in self._fill_answers(others, max_decodes, prompts=prompts):
            none = False
            yield filled
        if none:
            yield from self._fill_sources(sources)

    def _fill_answers(
        self, candidates: Collection[Answer], max_decodes: int, *, prompts: bool
    ) -> Iterator[tuple[Answer, SequenceSlice]]:
        """Yield slices within the budgets: decoding answers first, then prefill chunks."""
        budget, room, count = self._max_tokens, MAX_SAMPLING_BYTES, 0
        unread = _unread(candidates) if prompts else []
        share = max(1, budget // _PROMPT_SHARE)
        reserved = min(share, sum(a.num_unscheduled_tokens for a in unread))
        decodes = min(max_decodes, budget - reserved, MAX_SLICES - bool(unread))
        ready = [answer for answer in candidates if answer.num_unscheduled_tokens == 1]
        for answer in sorted(ready, key=lambda answer: answer.latest_slice):
            if count >= decodes:
                break
            if answer.sequence_id is None:  # it follows another, or was preempted in this loop
                continue
            if room < answer.sampling_bytes or not self._grow(answer):
                continue
            if not self._reach(answer, 1):
                continue
            count += 1
            budget -= 1
            room -= answer.sampling_bytes
            yield answer, self._slice(answer, 1)
        unread = _unread(candidates) if prompts else []  # with those that followed the preempted
        for answer, size in shared_out(unread, budget):
            if count >= MAX_SLICES or room < answer.sampling_bytes:
                return
            if answer.sequence_id is None or not (size := self._reach(answer, size)):
                continue
            size = self._sequences.until_snapshot(answer, size, self._followers.awaited(answer))
            count += 1
            room -= answer.sampling_bytes
            yield answer, self._slice(answer, size)

    def _fill_sources(self, answers: Collection[Answer]) -> Iterator[tuple[Answer, SequenceSlice]]:
        """Yield whole sources within the token budget, or one that is longer."""
        read = 0
        for count, (answer, _) in enumerate(shared_out(answers, self._max_tokens)):
            size = answer.request.source_tokens
            if count >= MAX_SLICES:
                return
            if not read or read + size <= self._max_tokens:
                read += size
                yield answer, self._slice(answer, size)

    def _reach(self, answer: Answer, size: int) -> int:
        """Return how many of the next `size` positions of an answer layers with a window can hold.

        Others are preempted if need be, where they share what those layers could drop.
        """
        start = answer.num_scheduled_tokens
        while answer.sequence_id is not None:
            stop = self._ledger.reach(answer.sequence_id, start, start + size)
            if stop > start:
                return stop - start
            victim = self._victim(answer)
            if victim is None:
                break
            self._preempt(victim)
        return 0

    def _slice(self, answer: Answer, size: int) -> SequenceSlice:
        sequence_id, start = answer.sequence_id, answer.num_scheduled_tokens
        assert sequence_id is not None
        awaited = self._followers.awaited(answer)
        snapshot = self._sequences.keep_snapshot(answer, start + size, awaited)
        self._sequences.step_began(sequence_id)
        answer.num_in_flight += 1
        self._num_slices += 1
        answer.latest_slice = self._num_slices
        answer.num_scheduled_tokens = start + size
        embed = answer.request.embeds
        sample = answer.num_scheduled_tokens == len(answer.token_ids) and not embed
        sampling = None
        if sample and not answer.sampling_sent:
            sampling, answer.sampling_sent = answer.sampling, True
        prefix = answer.prefix
        return SequenceSlice(
            sequence_id=sequence_id,
            start=start,
            num_tokens=size,
            sample=sample,
            sampling=sampling,
            prefix=prefix if prefix and prefix.length == start else None,
            masked=sample and answer.mask is not None,
            embed=embed,
            snapshot=snapshot,
            source=answer.request.source_tokens,
        )

    def _grow(self, answer: Answer) -> bool:
        """Make room for an answer's next token, preempting others if need be; return whether."""
        assert answer.sequence_id is not None
        while not self._ledger.extend(answer.sequence_id, len(answer.token_ids) + 1):
            victim = self._victim(answer)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is answer:
                return False
        return True

    def _victim(self, answer: Answer) -> Answer | None:
        """Return which answer to preempt for `answer`; None: wait until steps have ended."""
        holding = self._holding()
        younger = [a for a in holding if a.number > answer.number and not a.num_in_flight]
        if younger:
            return max(younger, key=lambda other: other.number)
        if self._sequences.are_computed:
            return None
        if len(holding) == 1:
            # It is alone and has no room: its shared prefix keeps more than it uses itself.
            answer.shares = False
        return answer

    def complete(self, step: Step, sums: Sequence[FloatVector] = ()) -> list[bool]:
        """Take a step that all stages have run; return whether each sampled token is current.

        Sums of hidden states count for answers that are, each position once: whatever is computed
        again was forgotten before.

        A token is not current if its answer has been restarted or has ended since. An answer that
        got a token is cleared of suspicion; after a prefill chunk it is not, because what breaks
        the stages may be in a later chunk.
        """
        self.on_change()
        are_current = []
        left = iter(sums)
        for answer, part in zip(step.answers, step.slices, strict=True):
            is_current = answer.sequence_id == part.sequence_id
            total = next(left) if part.embed else None
            if is_current:
                answer.num_in_flight -= 1
                if total is not None:
                    assert answer.num_computed_tokens == part.start
                    answer.pool(total)
                answer.num_computed_tokens = part.start + part.num_tokens
                self._ledger.computed(part.sequence_id, answer.num_computed_tokens)
                if part.sample:
                    answer.clear_suspicion()
                self._release_followers(answer)
            self._sequences.step_ended(part.sequence_id)
            if part.sample:
                are_current.append(is_current)
        return are_current

    def abandon(self, step: Step) -> None:
        """Set the answers in an abandoned step back to what is computed."""
        self.on_change()
        for answer, part in zip(step.answers, step.slices, strict=True):
            if answer.sequence_id == part.sequence_id:
                answer.num_in_flight -= 1
                answer.num_scheduled_tokens = answer.num_computed_tokens
                answer.sampling_sent = False
            if self._windows.state:
                self._ledger.set_back(part.sequence_id, part.start)
            self._sequences.step_ended(part.sequence_id)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._ledger.validate()
        assert len(self._running) <= self._max_sequences
        self._sequences.validate(self.running)
        for answer in self._running.values():
            assert answer.state is AnswerState.RUNNING
            assert (answer.sequence_id is None) == (answer.waits_for is not None)
            assert answer.num_in_flight <= 1 or not self._windows.state
            assert 0 <= answer.num_computed_tokens <= answer.num_scheduled_tokens
            assert answer.num_scheduled_tokens <= len(answer.token_ids)
            assert answer.num_in_flight or answer.num_computed_tokens < len(answer.token_ids)
            leader = answer.waits_for
            assert leader is None or leader.number in self._running
            self._followers.validate(answer)


def _unread(answers: Iterable[Answer]) -> list[Answer]:
    """Return the answers that have a sequence and part of a prompt to compute."""
    return [a for a in answers if a.sequence_id is not None and a.num_unscheduled_tokens > 1]
