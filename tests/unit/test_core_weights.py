"""The core in a simulated cluster: who is told to give weights, to whom, and who is told whence."""

from distributed_llm.common.messages import FetchProgress, GiveWeights, Heartbeat, LoadStage
from distributed_llm.common.types import LayerRange
from tests.unit.fake_model import BIG
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import World, with_settings

EVEN = with_settings(strategy="even")
ROOM = 4000
"""Memory for the whole model, twice."""


def joined(
    world: World, count: int, memory: int = ROOM, *, fetches: bool = True
) -> list[SimWorker]:
    """Return that many workers that get their weights from others, once they serve."""
    workers = [world.worker(f"w{number}", memory) for number in range(count)]
    for worker in workers:
        worker.fetches = fetches
    assert world.run(lambda: world.state == "serving")
    return workers


def moved(world: World, *cuts: int) -> None:
    """Have the layers cut there and each range moved to the next worker; wait until it is done."""
    names = [worker.id for worker in world.core._registry.fit]
    shift = names.index(world.plan()[0].worker_id) + 1  # type: ignore[arg-type]
    before = [len(worker.loaded) for worker in world.workers]
    world.move(cuts, shift)
    loads = zip(world.workers, before, strict=True)
    assert world.run(lambda: all(len(one.loaded) > count for one, count in [*loads]), for_s=20.0)
    world.settle()


def last(worker: SimWorker) -> LoadStage:
    return worker.loaded[-1]


def givers(worker: SimWorker) -> set[str]:
    return {source.worker for source in last(worker).sources}


def num_told(world: World) -> int:
    return world.counts["down", GiveWeights]


def test_the_first_workers_have_nobody_but_the_coordinator() -> None:
    world = World(EVEN)
    for worker in joined(world, 2):
        assert givers(worker) == set()
    assert num_told(world) == 0


def test_who_loads_layers_that_others_have_is_told_so_and_let_in() -> None:
    world = World(EVEN)
    first, second = joined(world, 2, BIG)
    held = {worker.name: last(worker).layers for worker in (first, second)}
    first.kill()
    world.worker("w2").fetches = True
    assert world.run(lambda: world.state == "serving" and world.epoch > 1)
    late = world.workers[2]
    overlap = set(range(last(late).layers.start, last(late).layers.stop)) & set(
        range(held["w1"].start, held["w1"].stop)
    )
    assert givers(late) == ({"w1"} if overlap else set())
    assert late.key in second.agent._stages._readers or not overlap


def test_a_move_names_those_who_have_the_layers() -> None:
    world = World(EVEN)
    joined(world, 2)
    before = world.checker.num_sources
    moved(world, 3)  # both get what the other one had
    for worker in world.workers:
        other = {one.name for one in world.workers if one is not worker}
        assert givers(worker) == other
        (source,) = last(worker).sources
        assert source.addresses == (f"{source.worker}:1",)
        assert source.key in {one.key for one in world.workers if one.name == source.worker}
        assert worker.agent.may_read(source.key)
    assert world.checker.num_sources - before == 2
    assert num_told(world) == 2


def test_workers_with_copies_of_their_own_give_nothing() -> None:
    world = World(EVEN)
    joined(world, 2, fetches=False)
    moved(world, 3)
    assert [givers(worker) for worker in world.workers] == [set(), set()]
    assert num_told(world) == 0


def test_who_lost_its_session_is_no_source_until_it_has_loaded_again() -> None:
    world = World(EVEN)
    first, second = joined(world, 2)
    first.lose_connection()
    world.run(lambda: world.state == "serving" and len(first.loaded) > 1)
    assert "w0" not in givers(second) or last(second).epoch < last(first).epoch


def test_progress_of_a_fetch_is_told_in_the_status() -> None:
    world = World(EVEN)
    worker = world.worker("w0")
    other = world.worker("w1")
    for one in (worker, other):
        one.load_s = 5.0
    assert world.run(lambda: world.state == "loading")
    progress = FetchProgress(here_bytes=3, total_bytes=10, bytes_per_s=2.5, doing="asks")
    beat = Heartbeat(
        epochs=(),
        progress_age_s=0.0,
        tasks_waiting=0,
        memory_used_bytes=1,
        kv_bytes=1,
        loading=True,
        fetch=progress,
    )
    world.send_up(worker.link, beat, ())
    assert world.run(lambda: _fetch_of(world, "w0") == progress, for_s=1.0)
    assert _fetch_of(world, "w1") is None
    assert world.run(lambda: world.state == "serving")
    assert _fetch_of(world, "w0") is None


def _fetch_of(world: World, name: str) -> FetchProgress | None:
    status = world.core.status(now=world.now)
    return next(worker.fetch for worker in status.workers if worker.name == name)


def test_layers_that_several_have_are_got_from_all_of_them() -> None:
    world = World(EVEN)
    workers = joined(world, 3)
    for _ in range(4):
        moved(world, 2, 4)
    for worker in workers:
        assert givers(worker) == {one.name for one in workers if one is not worker}
        assert {source.layers for source in last(worker).sources} == {(LayerRange(0, 6),)}
