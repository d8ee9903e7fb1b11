"""The core in a simulated cluster: what workers hand to each other, and what it relays."""

import pytest

from distributed_llm.common.messages import Heartbeat, LinkReport, PeerHello, Task, TaskResult
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.simulation import LONG, Fault, FaultKind, Way, World, finish

LEASE_S = 3.0


def forty() -> SamplingParams:
    """Return the parameters of an answer of forty tokens."""
    return SamplingParams(max_new_tokens=40, ignore_eos=True)


def steps_begun(world: World) -> int:
    """Return how many tasks the first stage computed."""
    return world.plan()[0].num_tasks


# ------------------------------------------------------------------ who carries what


def test_tasks_between_workers_never_pass_the_coordinator() -> None:
    world = World()
    world.linked(3)
    client = world.client()
    finish(world, client.submit(LONG), client.submit((1, 2)), client.submit((3,), forty()))
    steps = steps_begun(world)
    assert steps > 40
    assert world.counts["down", Task] == world.counts["up", TaskResult] == steps
    assert world.counts["across", Task] == 2 * steps


@pytest.mark.parametrize("cut", [(0,), (1,), (0, 1)])
def test_peers_that_cannot_reach_each_other_are_relayed(cut: tuple[int, ...]) -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    world.apart |= {(workers[i], workers[i + 1]) for i in cut}
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    finish(world, client.submit(LONG), client.submit((1, 2)))  # before it is known
    assert world.run(lambda: "" not in world.links, for_s=5.0)
    assert world.links == ["relayed" if i in cut else "direct" for i in range(2)]
    world.counts.clear()
    begun = steps_begun(world)
    finish(world, client.submit(LONG), client.submit((1, 2)))
    steps = steps_begun(world) - begun
    assert world.counts["across", Task] == (2 - len(cut)) * steps
    assert world.counts["down", Task] == world.counts["up", TaskResult] == (1 + len(cut)) * steps


def test_peers_that_come_to_reach_each_other_are_relayed_no_longer() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    world.apart.add((workers[0], workers[1]))
    assert world.run(lambda: world.links == ["relayed", "direct"])
    world.apart.clear()
    assert world.run(lambda: world.links == ["direct", "direct"], for_s=6.0)
    world.counts.clear()
    finish(world, world.client().submit(LONG))
    assert world.counts["up", TaskResult] * 2 == world.counts["across", Task]


def test_link_that_comes_up_under_load_is_used() -> None:
    """Steps that are relayed there must end first; nobody waits for them to end by chance."""
    world = World()
    workers = [world.worker(f"w{i}", 4000) for i in range(3)]
    world.apart.add((workers[0], workers[1]))
    assert world.run(lambda: world.links == ["relayed", "direct"])
    client = world.client()
    answers = [
        client.submit((i,), SamplingParams(max_new_tokens=200, ignore_eos=True)) for i in range(8)
    ]
    for worker in workers:
        worker.token_s = 0.003
    world.run(lambda: min(len(a.token_ids) for a in answers) >= 1)
    world.apart.clear()
    assert world.run(lambda: world.links == ["direct"] * 2, for_s=6.0)
    world.run(for_s=0.2)
    world.counts.clear()
    world.run(for_s=0.5)
    assert world.counts["across", Task] > 20
    assert world.counts["down", Task] < 0.6 * world.counts["across", Task]
    finish(world, *answers)


@pytest.mark.parametrize("wait_s", [0.001 * i for i in range(12)])
def test_link_that_comes_up_in_mid_prompt_breaks_no_step(wait_s: float) -> None:
    """What is handed on directly must not overtake what was relayed just before."""
    world = World(delay_s=(0.001, 0.004))
    workers = [world.worker(f"w{i}", 2000) for i in range(3)]
    for worker in workers:
        worker.task_s = 0.0005
    world.apart |= {(workers[0], workers[1]), (workers[1], workers[2])}
    assert world.run(lambda: world.links == ["relayed"] * 2)
    client = world.client()
    for text in range(3):  # chunks follow each other closely once that was measured to be good
        finish(world, client.submit([(i + text) % 90 for i in range(200)]))
    world.apart.clear()
    dial_at = min(w.dial_at for w in workers[:2])
    world.run(for_s=dial_at - world.now - wait_s)
    answer = client.submit([(i * 7) % 90 for i in range(240)])
    finish(world, answer)
    assert world.links == ["direct"] * 2
    assert not [line for line in world.logs if "failed a step" in line]


def test_relayed_result_that_comes_twice_goes_on_once() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    world.apart |= {(workers[0], workers[1]), (workers[1], workers[2])}
    assert world.run(lambda: world.links == ["relayed"] * 2)
    answer = world.client().submit(LONG, forty())
    world.run(lambda: len(answer.token_ids) == 5)
    world.counts.clear()
    begun = steps_begun(world)
    world.faults.append(Fault(TaskResult, "duplicate", 20))
    world.run(lambda: not world.faults)
    finish(world, answer)
    assert abs(world.counts["down", Task] - 3 * (steps_begun(world) - begun)) <= 2  # under way
    assert world.rejected["late_result"] >= 19


# ------------------------------------------------------------------ links that break


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("wait_s", [0.0, 0.0004, 0.0008, 0.0012, 0.0016, 0.002, 0.003, 0.005])
def test_link_cut_in_mid_step_falls_back_and_comes_back(stage: int, wait_s: float) -> None:
    world = World()
    worker = world.linked(3)[stage]
    client = world.client()
    answer, other = client.submit(LONG, forty()), client.submit((1, 2, 3))
    world.run(lambda: len(answer.token_ids) == 5)
    world.run(for_s=wait_s)
    worker.cut()
    cut_at = world.now
    assert world.run(lambda: "relayed" in world.links, for_s=0.1)
    world.counts.clear()
    assert world.run(lambda: len(answer.token_ids) == 30, for_s=1.0)
    assert world.now - cut_at < 1.0  # nobody waited for a lease
    assert world.counts["up", TaskResult] > 30
    finish(world, answer, other)
    assert world.epoch == 1
    assert world.run(lambda: world.links == ["direct"] * 2, for_s=6.0)
    world.counts.clear()
    finish(world, client.submit(LONG))
    assert world.counts["across", Task] == 2 * world.counts["up", TaskResult]


@pytest.mark.parametrize("stage", [0, 1])
def test_link_cut_in_mid_prompt(stage: int) -> None:
    for chunk in range(1, 4):
        world = World()
        workers = world.linked(3)
        left = [chunk]

        def cut(task: Task, world: World = world, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                world.plan()[stage].cut()

        workers[stage].after_task = cut
        client = world.client()
        began = world.now
        answers = [client.submit(LONG), client.submit((1, 2, 3))]
        assert world.run(world.all_ended)
        assert world.now - began < 1.0
        finish(world, *answers)
        assert world.epoch == 1


@pytest.mark.parametrize("kind", [Task, TaskResult])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_lost_on_the_way_is_computed_again_and_relayed(
    kind: type[Task] | type[TaskResult], stage: int
) -> None:
    world = World()
    workers = world.linked(3)
    client = world.client()
    answer = client.submit((7,), SamplingParams(max_new_tokens=120, ignore_eos=True))
    other = client.submit((1, 2))
    world.run(lambda: len(answer.token_ids) == 5)
    lost_at = workers[stage] if kind is Task else workers[2]
    way: Way = "across" if kind is Task else "up"
    world.faults.append(Fault(kind, "drop", 1, lost_at, way=way))
    world.run(lambda: not world.faults)
    world.counts.clear()
    count, lost = len(answer.token_ids), world.now
    assert world.run(lambda: len(answer.token_ids) > count + 1)
    assert LEASE_S - 1.1 < world.now - lost < LEASE_S + 0.1
    relayed = world.counts["down", Task]
    world.run(lambda: len(answer.token_ids) > count + 90)
    assert world.counts["across", Task] > 20  # handed on directly again
    finish(world, answer, other)
    assert relayed > 1
    assert world.epoch == 1
    assert not [line for line in world.logs if "failed a step" in line]


def test_what_comes_late_on_a_link_is_void() -> None:
    """The delayed task is older than what its stage has computed meanwhile."""
    world = World()
    workers = world.linked(3)
    answer = world.client().submit(LONG, forty())
    world.run(lambda: len(answer.token_ids) == 5)
    world.faults.append(Fault(Task, "delay", 1, workers[1], delay_s=3.5, way="across"))
    finish(world, answer)
    assert world.epoch == 1
    assert not [line for line in world.logs if "failed a step" in line]


def test_sequences_freed_in_a_step_that_was_lost_are_freed_by_a_later_one() -> None:
    world = World()
    workers = world.linked(3, 2000)
    client = world.client()
    gone, answer = client.submit(LONG, forty()), client.submit((1, 2), forty())
    world.run(lambda: len(gone.token_ids) == 5)

    def lose(task: Task) -> None:
        if task.released:
            world.faults.append(Fault(Task, "drop", 1, workers[1], way="across"))
            workers[0].before_task = lambda task: None

    workers[0].before_task = lose
    client.cancel("r0")
    world.run(lambda: answer.end is not None)
    assert [w.stage.kv.keys() - {2} for w in workers if w.stage] == [set()] * 3
    finish(world, answer)


@pytest.mark.parametrize("what", ["drop", "duplicate", "delay"])
@pytest.mark.parametrize("kind", [PeerHello, LinkReport])
def test_message_about_a_link_is_lost_repeated_or_late(
    kind: type[PeerHello] | type[LinkReport], what: FaultKind
) -> None:
    world = World()
    world.faults.append(Fault(kind, what, 2))
    world.serving(3)
    client = world.client()
    finish(world, client.submit(LONG), client.submit((1, 2)))
    world.run(for_s=6.0)
    finish(world, client.submit(LONG))
    assert world.epoch == 1


def test_worker_that_holds_a_step_is_given_up_and_no_other() -> None:
    """After the first lease all hops are relayed: then it is known where a step is."""
    for stage in range(3):
        world = World()
        workers = world.linked(3)
        answer = world.client().submit(LONG)
        world.run(lambda answer=answer: len(answer.token_ids) == 2)  # type: ignore[misc]
        workers[stage].hung = True
        finish(world, answer)
        assert [w.num_sessions for w in workers] == [1 + (i == stage) for i in range(3)]


def test_neighbour_that_dies_is_not_the_neighbour_that_reports_it() -> None:
    world = World()
    workers = world.linked(3)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    workers[1].kill()
    finish(world, answer)
    assert [w.num_sessions for w in workers] == [1, 1, 1]
    assert world.counts["up", Heartbeat] > 0
    assert world.epoch == 2
    assert world.run(lambda: world.links == ["direct"], for_s=3.0)
