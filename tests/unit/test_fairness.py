"""Whose item is next: the order of a naive model, and no client ahead of another for long."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distributed_llm.coordinator.requests.fairness import FairQueue

CLIENTS = "abcd"


@dataclass(frozen=True)
class Job:
    """Equal jobs are not the same job."""

    cost: int = 1


def popped(queue: FairQueue[Job]) -> list[Job]:
    """Return what waits, in the order in which it comes without further service."""
    return [queue.pop() for _ in range(len(queue))]


def same(a: list[Job], b: list[Job]) -> bool:
    return list(map(id, a)) == list(map(id, b))


def test_an_empty_queue_has_nothing_first() -> None:
    queue: FairQueue[Job] = FairQueue()
    assert queue.first() is None
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_first_come_first_served_within_a_client() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job() for _ in range(4)]
    for order in (2, 0, 3, 1):
        queue.add("a", jobs[order], order=order)
    assert queue.first() is jobs[0]
    assert same(popped(queue), jobs)


def test_what_is_put_back_comes_before_what_came_later() -> None:
    queue: FairQueue[Job] = FairQueue()
    old, new = Job(), Job()
    queue.add("a", old, order=0)
    queue.add("a", new, order=1)
    assert queue.pop() is old
    queue.add("a", old, order=0)
    assert same(popped(queue), [old, new])


def test_who_was_served_least_is_next() -> None:
    queue: FairQueue[Job] = FairQueue()
    many, one = [Job(), Job()], Job()
    for order, job in enumerate(many):
        queue.add("many", job, order=order)
    queue.add("one", one, order=2)
    assert queue.pop() is many[0]
    queue.charge("many", 1)
    assert queue.pop() is one


def test_who_was_served_the_same_comes_in_order_of_arrival() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job() for _ in range(3)]
    for order, job in enumerate(jobs):
        queue.add("cab"[order], job, order=order)
    assert same(popped(queue), jobs)


def test_idling_earns_nothing() -> None:
    queue: FairQueue[Job] = FairQueue()
    busy, back = [Job() for _ in range(3)], [Job() for _ in range(3)]
    queue.add("back", back[0], order=0)
    assert queue.pop() is back[0]
    for order, job in enumerate(busy):
        queue.add("busy", job, order=1 + order)
    queue.charge("busy", 1000)
    for order, job in enumerate(back):
        queue.add("back", job, order=10 + order)
    turns = []
    while len(queue):
        job = queue.pop()
        turns.append("busy" if any(job is one for one in busy) else "back")
        queue.charge(turns[-1], 1)
    assert turns == ["busy", "back"] * 3


def test_idling_does_not_make_up_for_service() -> None:
    queue: FairQueue[Job] = FairQueue()
    greedy, other = Job(), Job()
    queue.add("other", Job(), order=0)
    queue.add("greedy", Job(), order=1)
    popped(queue)
    queue.charge("greedy", 5)
    queue.add("greedy", greedy, order=2)
    queue.add("other", other, order=3)
    assert queue.pop() is greedy  # nobody else waited when it came: "other" starts beside it
    queue.charge("greedy", 5)
    queue.add("greedy", greedy, order=2)
    assert same(popped(queue), [other, greedy])


def test_remove_only_what_waits_and_is_the_clients() -> None:
    queue: FairQueue[Job] = FairQueue()
    gone, stays = Job(), Job()
    queue.add("a", gone, order=0)
    queue.add("a", stays, order=1)
    others = Job()
    queue.add("b", others, order=2)
    assert not queue.remove("b", gone)
    assert not queue.remove("nobody", gone)
    assert not queue.remove("a", Job())
    assert queue.remove("a", gone)
    assert not queue.remove("a", gone)
    assert queue.first() is stays
    assert same(list(queue), [stays, others])


def test_what_is_removed_may_come_back_later() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job() for _ in range(3)]
    for order, job in enumerate(jobs):
        queue.add("a", job, order=order)
    assert queue.remove("a", jobs[0])
    queue.add("a", jobs[0], order=3)
    queue.validate()
    assert same(popped(queue), [jobs[1], jobs[2], jobs[0]])


def test_a_forgotten_client_is_new() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job() for _ in range(2)]
    queue.add("a", Job(), order=0)
    queue.pop()
    queue.charge("a", 100)
    queue.forget("a")
    queue.charge("a", 100)  # late service of nobody
    queue.forget("a")
    queue.add("b", jobs[1], order=2)
    queue.add("a", jobs[0], order=1)
    assert same(popped(queue), jobs)


def test_an_item_cannot_wait_twice() -> None:
    queue: FairQueue[Job] = FairQueue()
    job = Job()
    queue.add("a", job, order=0)
    queue.add("b", job, order=1)
    with pytest.raises(AssertionError, match="waits twice"):
        queue.validate()


def test_a_client_with_waiting_work_cannot_be_forgotten() -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.add("a", Job(), order=0)
    with pytest.raises(AssertionError, match="waits"):
        queue.forget("a")


class Naive:
    """What the queue shall do, written as plainly as possible."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, int, Job]] = []  # client, order, job
        self.counters: dict[str, int] = {}
        self.last = 0
        self.last_client = ""

    def add(self, client: str, job: Job, order: int) -> None:
        if client not in (other for other, _, _ in self.waiting):
            active = [self.counters[other] for other, _, _ in self.waiting]
            level = min(active) if active else self.counters.get(self.last_client, self.last)
            self.counters[client] = max(self.counters.get(client, 0), level)
        self.waiting.append((client, order, job))

    def first(self) -> tuple[str, int, Job]:
        heads: dict[str, tuple[int, Job]] = {}
        for client, order, job in sorted(self.waiting, key=lambda entry: entry[1]):
            heads.setdefault(client, (order, job))
        client = min(heads, key=lambda one: (self.counters[one], heads[one][0]))
        return client, *heads[client]

    def remove(self, entry: tuple[str, int, Job]) -> None:
        self.waiting = [other for other in self.waiting if other[2] is not entry[2]]
        if entry[0] not in (client for client, _, _ in self.waiting):
            self.last_client = entry[0]

    def forget(self, client: str) -> None:
        counter = self.counters.pop(client, 0)
        if client == self.last_client:
            self.last, self.last_client = counter, ""


class Machine(RuleBasedStateMachine):
    """Random work of four clients, in queue and model alike."""

    @initialize()
    def begin(self) -> None:
        self.queue: FairQueue[Job] = FairQueue()
        self.naive = Naive()
        self.running: list[tuple[str, int, Job]] = []
        self.arrivals = 0

    @rule(client=st.sampled_from(CLIENTS))
    def arrive(self, client: str) -> None:
        self.arrivals += 1
        self.put(client, Job(), self.arrivals)

    def put(self, client: str, job: Job, order: int) -> None:
        self.queue.add(client, job, order=order)
        self.naive.add(client, job, order)

    @rule(cost=st.integers(0, 9))
    def start(self, cost: int) -> None:
        if self.naive.waiting:
            entry = self.naive.first()
            assert self.queue.pop() is entry[2]
            self.naive.remove(entry)
            self.running.append(entry)
            self.serve(entry[0], cost)

    @rule(client=st.sampled_from(CLIENTS), cost=st.integers(0, 9))
    def serve(self, client: str, cost: int) -> None:
        self.queue.charge(client, cost)
        if client in self.naive.counters:
            self.naive.counters[client] += cost

    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        if self.running:
            client, order, job = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.put(client, job, order)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.naive.waiting:
            entry = data.draw(st.sampled_from(self.naive.waiting))
            assert self.queue.remove(entry[0], entry[2])
            self.naive.remove(entry)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            job = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))[2]
            assert not any(self.queue.remove(client, job) for client in CLIENTS)

    @rule(client=st.sampled_from(CLIENTS))
    def leave(self, client: str) -> None:
        if client not in (other for other, _, _ in self.naive.waiting):
            self.queue.forget(client)
            self.naive.forget(client)
            self.running = [entry for entry in self.running if entry[0] != client]

    @invariant()
    def agree(self) -> None:
        self.queue.validate()
        assert len(self.queue) == len(self.naive.waiting)
        assert {id(job) for job in self.queue} == {id(job) for _, _, job in self.naive.waiting}
        expected = self.naive.first()[2] if self.naive.waiting else None
        assert self.queue.first() is expected


TestAgainstTheModel = Machine.TestCase
TestAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 50), min_size=60, max_size=60), idlers=st.integers(0, 3))
def test_busy_clients_never_differ_by_more_than_one_item(costs: list[int], idlers: int) -> None:
    """Two clients that always have work waiting, among others that come and go."""
    queue: FairQueue[Job] = FairQueue()
    service = {"a": 0, "b": 0}
    jobs: list[tuple[str, Job]] = []

    def add(client: str, cost: int) -> None:
        jobs.append((client, Job(cost)))
        queue.add(client, jobs[-1][1], order=len(jobs))

    add("a", costs[0])
    add("b", costs[1])
    for turn, cost in enumerate(costs[2:]):
        for client in ("a", "b", *["idler"] * (turn % 5 < idlers)):
            add(client, cost)
        job = queue.pop()
        client = next(owner for owner, other in jobs if other is job)
        queue.charge(client, job.cost)
        if client in service:
            service[client] += job.cost
        assert abs(service["a"] - service["b"]) <= max(costs)
