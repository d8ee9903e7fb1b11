"""The scheduler in random schedules: whoever is not cancelled gets the right tokens, in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.coordinator.requests.answer_states import AnswerCause, AnswerState
from distributed_llm.coordinator.requests.request import Answer, Suspects
from distributed_llm.coordinator.serving.step import Step
from tests.unit.test_scheduler import Bench


def next_token(context: Sequence[int]) -> int:
    """Return the token after these: any mistake in them changes it."""
    return hash(tuple(context)) % 997


def reference(prompt: Sequence[int], count: int) -> list[int]:
    """Return the prompt and its answer, computed without any schedule."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


@dataclass
class Stages:
    """All stages in one: what tasks do to it, told in the plainest way."""

    held: dict[int, list[int]] = field(default_factory=dict)
    sampling: dict[int, Sampling] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    def free(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            self.held.pop(sequence_id, None)
            self.sampling.pop(sequence_id, None)

    def missing(self, step: Step) -> list[SequenceId]:
        """Return the sequences of a step that lack positions; only what was lost may."""
        found = []
        for part in step.slices:
            source = part.sequence_id
            if source not in self.held and part.prefix:
                source = part.prefix.sequence_id
            if len(self.held.get(source, [])) < part.start:
                assert source in self.lost
                found.append(part.sequence_id)
        return found

    def run(self, step: Step) -> list[int]:
        """Compute a step; return the tokens that it samples."""
        sampled, at = [], 0
        for answer, part in zip(step.answers, step.slices, strict=True):
            held = self._begin(part)
            del held[part.start :]
            held += step.token_ids[at : at + part.num_tokens]
            at += part.num_tokens
            assert held == answer.token_ids[: len(held)]
            if part.sampling:
                self.sampling[part.sequence_id] = part.sampling
            if part.sample:
                assert self.sampling[part.sequence_id] == answer.sampling
                sampled.append(next_token(held))
        assert at == len(step.token_ids)
        return sampled

    def _begin(self, part: SequenceSlice) -> list[int]:
        if part.sequence_id not in self.held and part.prefix:
            assert part.prefix.length == part.start
            self.held[part.sequence_id] = self.held[part.prefix.sequence_id][: part.start]
        if part.prefix and part.prefix.take:
            self.free([part.prefix.sequence_id])
        return self.held.setdefault(part.sequence_id, [])


Sent = tuple[list[SequenceId], Step]
"""A step under way, and the sequences to free before it."""

_INDEX = st.integers(0, 10**6)


class Schedules(RuleBasedStateMachine):
    """Answers that come, are cancelled and lose steps; every other one ends with its tokens."""

    @initialize(
        sequences=st.integers(1, 8),
        tokens=st.sampled_from([1, 7, 40, 200]),
        blocks=st.sampled_from([4, 6, 10, 40]),
    )
    def start(self, sequences: int, tokens: int, blocks: int) -> None:
        self.bench = Bench(sequences=sequences, tokens=tokens, blocks=blocks)
        self.scheduler = self.bench.scheduler
        self.max_tokens, self.capacity = tokens, blocks * KV_BLOCK
        self.stages = Stages()
        self.waiting: list[Answer] = []
        self.under_way: list[Sent] = []
        self.to_free: list[SequenceId] = []
        self.expected: dict[Answer, list[int]] = {}

    @rule(
        family=st.integers(0, 2),
        common=st.integers(0, 150),
        own=st.integers(1, 60),
        new_tokens=st.integers(1, 40),
        client=st.sampled_from([b"a", b"b"]),
    )
    def arrive(self, family: int, common: int, own: int, new_tokens: int, client: bytes) -> None:
        """Mostly it begins like others."""
        tail = [9000 + len(self.expected)] * own
        prompt = [*range(1000 * family, 1000 * family + common), *tail]
        self._arrive(prompt, new_tokens, client)

    @precondition(lambda self: self.expected)
    @rule(index=_INDEX, own=st.integers(1, 20), new_tokens=st.integers(1, 20))
    def go_on(self, index: int, own: int, new_tokens: int) -> None:
        """The next turn of a conversation."""
        before = list(self.expected)[index % len(self.expected)].token_ids[:150]
        self._arrive([*before, *[5000] * own], new_tokens, b"a")

    def _arrive(self, prompt: list[int], new_tokens: int, client: bytes) -> None:
        answer = self.bench.answer(prompt, new_tokens=new_tokens, client=client)
        assert answer.request.reserved_tokens <= self.capacity
        self.expected[answer] = reference(prompt, new_tokens)
        self.waiting.append(answer)

    @rule(depth=st.integers(1, 4), max_decodes=st.integers(1, 4), chunks=st.integers(1, 4))
    def begin(self, depth: int, max_decodes: int, chunks: int) -> None:
        """Admit who is next and begin steps, in the order in which the coordinator does."""
        self._admit()
        while len(self.under_way) < depth:
            self._begin(max_decodes, chunks)
            if not self.began:
                break
        self._collect()
        assert self.under_way or not self.scheduler.num_running, "they run, but nothing does"

    def _begin(self, max_decodes: int, chunks: int) -> None:
        before = [a.number for a in self.scheduler.running if a.sequence_id is not None]
        idle = not self.under_way
        prompts = sum(not step.decodes for _, step in self.under_way) < chunks
        step = self.scheduler.next_step(max_decodes=max_decodes, prompts=prompts, idle=idle)
        self.to_free += self.scheduler.take_freed()
        preempted = self._take_preempted()
        if len(before) > 1:
            assert min(before) not in preempted, "the oldest was preempted"
        self.began = step is not None
        if step:
            self._check(step, max_decodes)
            self.under_way.append((self.to_free, step))
            self.to_free = []

    def _check(self, step: Step, max_decodes: int) -> None:
        assert len(step.token_ids) == sum(p.num_tokens for p in step.slices) <= self.max_tokens
        pairs = list(zip(step.answers, step.slices, strict=True))
        answering = [p for _, p in pairs if p.sample and p.num_tokens == 1 and p.start > 0]
        assert len(answering) <= max_decodes
        for answer, part in pairs:
            assert part.sample == (part.start + part.num_tokens == len(answer.token_ids))
        if any(answer.suspects for answer in step.answers):
            assert len({answer.suspects for answer in step.answers}) == 1
            assert not self.under_way

    def _admit(self) -> None:
        self._collect()
        while self.waiting and self.bench.admit(self.waiting[0]):
            self.waiting.pop(0)
        nothing_runs = not self.scheduler.num_running and not self.under_way
        assert not (self.waiting and nothing_runs), "there is room, but nobody is admitted"

    def _take_preempted(self) -> list[int]:
        """Let preempted answers wait; return their numbers."""
        preempted = self.scheduler.take_preempted()
        self.waiting = sorted([*self.waiting, *preempted], key=lambda answer: answer.number)
        return [answer.number for answer in preempted]

    def _collect(self) -> None:
        """Preempted answers wait; freed sequences are freed before the next step, or now."""
        self._take_preempted()
        self.to_free += self.scheduler.take_freed()
        if not self.under_way:
            self.stages.free(self.to_free)
            self.to_free = []

    @precondition(lambda self: self.under_way)
    @rule()
    def land(self) -> None:
        released, step = self.under_way[0]
        self.stages.free(released)
        missing = self.stages.missing(step)
        if missing:
            self._break(step, missing)
            return
        tokens = self.stages.run(step)
        del self.under_way[0]
        are_current = self.scheduler.complete(step)
        for answer, token, is_current in zip(step.samplers, tokens, are_current, strict=True):
            if is_current:
                self._append(answer, token)
        self._collect()

    def _append(self, answer: Answer, token: int) -> None:
        answer.append(token, None, now=1.0)
        if answer.finish_reason:
            assert answer.token_ids == self.expected[answer]
            self.scheduler.remove(answer, keep=answer.number % 4 > 0)
            answer.change(AnswerCause.LAST_TOKEN)

    def _break(self, step: Step, missing: list[SequenceId]) -> None:
        for answer, part in zip(step.answers, step.slices, strict=True):
            if part.sequence_id in missing and answer.sequence_id == part.sequence_id:
                self.scheduler.restart(answer)
                answer.suspects = Suspects()
        self.abandon(0)

    @rule(executed=st.integers(0, 3))
    def abandon(self, executed: int) -> None:
        """All steps under way are given up; stages have run some of them."""
        given_up, self.under_way = self.under_way, []
        for released, step in given_up[:executed]:
            self.stages.free(released)
            if self.stages.missing(step):
                break
            self.stages.run(step)
        for released, step in given_up:
            self.to_free += released
            self.scheduler.abandon(step)
        self._collect()

    @precondition(lambda self: self.scheduler.num_running or self.waiting)
    @rule(index=_INDEX, keep=st.booleans())
    def cancel(self, index: int, keep: bool) -> None:
        alive = [*self.scheduler.running, *self.waiting]
        answer = alive[index % len(alive)]
        if answer in self.waiting:
            self.waiting.remove(answer)
        self.scheduler.remove(answer, keep=keep)
        answer.change(AnswerCause.FAILED)
        self._collect()

    @precondition(lambda self: self.scheduler.num_running)
    @rule(index=_INDEX, count=st.integers(1, 4))
    def suspect(self, index: int, count: int) -> None:
        alive = list(self.scheduler.running)
        self.abandon(0)
        together = Suspects()
        for answer in alive[index % len(alive) :][:count]:
            answer.suspects = together

    @precondition(lambda self: self.stages.held)
    @rule(index=_INDEX)
    def lose(self, index: int) -> None:
        """The stages forget a sequence."""
        lost = list(self.stages.held)[index % len(self.stages.held)]
        self.stages.lost.add(lost)
        self.stages.free([lost])

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.validate()
        assert self.scheduler.kv_tokens_used + self.scheduler.kv_tokens_cached <= self.capacity

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self._drain()
        for answer, expected in self.expected.items():
            if answer.state is not AnswerState.GONE:
                assert answer.token_ids == expected
        assert self.scheduler.kv_tokens_used == 0
        # An answer that needs all the room drives out what is kept; then nothing is left.
        last = self.bench.answer([8000] * (self.capacity - 1), new_tokens=1)
        self.expected[last] = reference(last.token_ids, 1)
        self.waiting.append(last)
        self.begin(1, 1, 1)
        self.scheduler.remove(last)
        last.change(AnswerCause.FAILED)
        self._drain()
        assert self.scheduler.kv_tokens_cached == 0
        assert not self.stages.held

    def _drain(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.num_running and not self.waiting and not self.under_way:
                return
            self.begin(3, 2, 3)
            if self.under_way:  # else an answer, alone, gave its room up
                self.land()
            self.scheduler.validate()
        raise AssertionError("answers do not end")


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)
