"""The core in a simulated cluster: the model served by several pipelines at once."""

import pytest

from distributed_llm.common.messages import ClusterStatus, Finished
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import LayerRange
from tests.unit.fake_client import Answer
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import LONG, World, finish, with_settings

HALF = 900
"""Memory with which two workers hold the model, with room for two blocks, and one does not."""


def tokens(count: int) -> SamplingParams:
    """Return the parameters of an answer of so many tokens."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def two_pipelines(memory_bytes: int = HALF, count: int = 4) -> tuple[World, list[list[SimWorker]]]:
    """Return the workers of both pipelines, in the order of their layers."""
    world = World(with_settings(replicas=2))
    world.serving(count, memory_bytes)
    assert world.run(lambda: len(world.links) == count - 2 and set(world.links) == {"direct"})
    return world, all_in_flight(world)


def all_in_flight(world: World) -> list[list[SimWorker]]:
    """Return the workers of each pipeline, in the order of their layers."""
    by_id = {w.worker_id: w for w in world.workers if w.state != "dead"}
    pipelines = world.core._pipelines.all
    return [[by_id[stage.worker] for stage in pipeline.stages] for pipeline in pipelines]


def served_by(answer: Answer) -> set[str]:
    """Return the workers that computed for a finished request."""
    assert isinstance(answer.end, Finished)
    return {stage.worker for stage in answer.end.timings.stages}


def names(workers: list[SimWorker]) -> set[str]:
    """Return the names that the coordinator gave them."""
    return {worker.worker_id for worker in workers}


def status(world: World) -> ClusterStatus:
    """Return the cluster as it is."""
    return world.core.status(now=world.now)


def test_each_pipeline_covers_the_model() -> None:
    world, both = two_pipelines()
    for pipeline in both:
        layers = [w.epoch for w in pipeline]
        assert len(set(layers)) == 1
        assert [w.stage.layers for w in pipeline if w.stage] == [
            LayerRange(0, 3),
            LayerRange(3, 6),
        ]
    assert status(world).kv_tokens == 2 * 128
    assert status(world).epoch == 2


def test_two_pipelines_share_the_load() -> None:
    world, both = two_pipelines()
    client = world.client()
    answers = [client.submit((i,), tokens(30)) for i in range(16)]
    finish(world, *answers)
    for pipeline in both:
        assert sum(served_by(a) == names(pipeline) for a in answers) == 8


def test_slower_pipeline_gets_less() -> None:
    world, (quick, slow) = two_pipelines(20_000)  # no room is ever full
    for worker in slow:
        worker.token_s = 0.01
    client = world.client()
    for _ in range(3):
        finish(world, *(client.submit((i,), tokens(5)) for i in range(8)))
    answers = [client.submit((i,), tokens(20)) for i in range(24)]
    finish(world, *answers)
    assert sum(served_by(a) == names(quick) for a in answers) > 20


def test_request_goes_where_its_prefix_is() -> None:
    world, _ = two_pipelines(2000)
    client = world.client()
    prompt = [(7 * i) % 90 for i in range(60)]
    first = client.submit(prompt, tokens(3))
    finish(world, first)
    for _ in range(4):
        again = client.submit(prompt, tokens(3))
        finish(world, again)
        assert served_by(again) == served_by(first)
        assert isinstance(again.end, Finished)
        assert again.end.usage.cached_tokens == 59


@pytest.mark.parametrize("how", ["loudly", "silently", "hung"])
@pytest.mark.parametrize("stage", [0, 1])
def test_loss_in_one_pipeline_does_not_disturb_the_other(stage: int, how: str) -> None:
    world, both = two_pipelines()
    client = world.client()
    answers = [client.submit((i,), tokens(60)) for i in range(4)]
    world.run(lambda: min(len(a.token_ids) for a in answers) >= 10)
    victim, (hurt, sound) = both[0][stage], both
    oldest: list[int] = []
    sound[0].before_task = lambda task: oldest.append(task.oldest)
    if how == "hung":
        victim.hung = True
    else:
        victim.kill(silently=how == "silently")
    finish(world, *answers)
    assert set(oldest) == {1}  # no step was given up
    moved = [a for a in answers if served_by(a) & names(hurt)]
    stayed = [a for a in answers if a not in moved]
    assert len(moved) == len(stayed) == 2
    for answer in stayed:
        assert isinstance(answer.end, Finished)
        assert answer.end.timings.stages[0].tasks == 60
        assert (
            max(b - a for a, b in zip(answer.token_times, answer.token_times[1:], strict=False))
            < 0.1
        )
    for answer in moved:
        assert served_by(answer) >= names(sound)


def test_pipeline_is_made_again_by_a_joiner_while_requests_run() -> None:
    world, both = two_pipelines()
    client = world.client()
    answer = client.submit(LONG, tokens(100))
    world.run(lambda: len(answer.token_ids) == 5)
    victim = both[1][0] if served_by_now(world, both[0]) else both[0][0]
    victim.kill()
    world.run(for_s=0.01)
    assert len(all_in_flight(world)) == 1
    world.worker("spare", HALF)
    for worker in both[0] + both[1]:
        worker.task_s = 0.02  # long enough for all of this
    assert world.run(lambda: len(all_in_flight(world)) == 2 and status(world).kv_tokens == 256)
    assert answer.end is None
    finish(world, answer)
    answers = [client.submit((i,), tokens(10)) for i in range(8)]
    finish(world, *answers)
    assert len({frozenset(served_by(a)) for a in answers}) == 2


def served_by_now(world: World, pipeline: list[SimWorker]) -> bool:
    """Return whether a pipeline has KV cache of a request."""
    return any(worker.stage is not None and worker.stage.kv for worker in pipeline)


def test_what_is_left_of_a_pipeline_is_used_once_nothing_runs() -> None:
    """Two pipelines of two; one worker dies; three are left, and there is no fourth."""
    world, both = two_pipelines(HALF)
    client = world.client()
    answers = [client.submit((i,), tokens(40)) for i in range(4)]
    world.run(lambda: min(len(a.token_ids) for a in answers) >= 5)
    both[0][0].kill()
    finish(world, *answers)
    assert world.run(lambda: [len(p) for p in all_in_flight(world)] == [3], for_s=2.0)
    assert world.run(lambda: world.state == "serving")
    finish(world, client.submit(LONG))


def test_pipeline_that_is_not_touched_keeps_its_layers() -> None:
    world, _ = two_pipelines()
    epochs = {w.worker_id: w.epoch for w in world.workers}
    world.worker("fifth", 600)  # too little to change anything for the other two
    world.run(for_s=3.0)
    finish(world, world.client().submit(LONG))
    same = [w for w in world.workers if epochs.get(w.worker_id) == w.epoch]
    assert len(same) >= 2


def test_too_few_for_two_serve_once() -> None:
    world = World(with_settings(replicas=2))
    world.serving(3, 600)
    assert len(all_in_flight(world)) == 1
    finish(world, world.client().submit(LONG))


# ------------------------------------------------------------------ pipelines of different size


def unequal() -> tuple[World, list[SimWorker], list[SimWorker]]:
    """Return a busy pipeline with room for two blocks, and one with room for three."""
    world = World(with_settings(replicas=2))
    small = [world.worker(f"s{i}", HALF) for i in range(2)]
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    busy = client.submit((1,), tokens(60))
    world.run(lambda: len(busy.token_ids) == 1)
    for worker in small:
        worker.task_s = 0.05
    large = [world.worker(f"l{i}", 700) for i in range(3)]  # one alone does not hold the model
    assert world.run(lambda: status(world).kv_tokens == 128 + 192)
    assert all_in_flight(world) == [small, large]
    return world, small, large


def test_request_that_fits_only_one_pipeline_runs_there() -> None:
    world, _, large = unequal()
    client = world.client()
    answers = [client.submit([i] * 20, tokens(140)) for i in range(4)]
    finish(world, *world.clients[0].answers.values(), *answers)
    assert all(names(large) <= served_by(a) for a in answers)


def test_what_waits_for_the_larger_pipeline_holds_up_nobody_who_fits_the_smaller() -> None:
    world, small, _ = unequal()
    client = world.client()
    long = [client.submit([i] * 70, tokens(100)) for i in range(2)]  # each takes two blocks
    world.run(lambda: bool(long[0].token_ids))
    short = client.submit((5,), tokens(5))
    assert world.run(lambda: short.end is not None)
    assert served_by(short) == names(small)
    assert not long[1].token_ids
    finish(world, *long)


@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.5, 1.0, 2.0])
def test_request_that_fits_nothing_after_a_loss_is_told_so(wait_s: float) -> None:
    world, small, large = unequal()
    client = world.client()
    answers = [client.submit([i] * 20, tokens(140)) for i in range(8)]
    short = client.submit((5,), tokens(20))
    world.run(for_s=wait_s)
    for worker in large[:2]:
        worker.kill()
    world.run(for_s=0.02)
    late = client.submit([1] * 20, tokens(140))
    assert world.run(world.all_ended)
    for answer in answers:
        answer.check()
        assert answer.code in ("not_enough_memory", "")
    assert {a.code for a in answers} != {""}
    assert late.code == "not_enough_memory"
    finish(world, short)
    assert names(small) <= names(world.plan())


def test_what_only_a_pipeline_that_loads_has_room_for_holds_nobody_up() -> None:
    """Two workers serve with room for two blocks; a large one takes a minute to load."""
    world = World(with_settings(replicas=2))
    world.serving(2, HALF)
    large = world.worker("large", 5000)
    large.load_s = 60.0
    assert world.run(lambda: large.epoch == 2, for_s=5.0)
    client = world.client()
    long = client.submit(range(90), tokens(60))
    world.run(for_s=0.5)
    short = [client.submit((number,), tokens(10)) for number in range(4)]
    assert world.run(lambda: all(answer.end for answer in short), for_s=10.0)
    assert long.end is None
    finish(world, long, *short)
    assert served_by(long) == {"large"}
