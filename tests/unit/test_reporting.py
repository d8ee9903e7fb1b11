"""What a status says of a simulated cluster: facts that can be counted by hand."""

import pytest

from distributed_llm.common.codec import decode_status, encode_payload
from distributed_llm.common.messages import ClusterStatus, Histogram, PipelineStatus, TaskResult
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.fake_model import MODEL
from tests.unit.simulation import Fault, World, finish, with_settings

ROOMY = 4000
"""Memory with which workers have room for more than any test needs."""

PROMPT = tuple(range(1, 41))


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def status(world: World) -> ClusterStatus:
    """Return the cluster as a client sees it: everything is within the limits of the wire."""
    made = world.core.status(now=world.now)
    assert decode_status(encode_payload(made)) == made
    return made


def only_pipeline(world: World) -> PipelineStatus:
    (pipeline,) = status(world).pipelines
    return pipeline


def served(count: int = 10) -> World:
    """Return a cluster of three workers that has answered one request."""
    world = World()
    for worker in world.linked(3):
        worker.layer_s = 0.01
    finish(world, world.client().submit(PROMPT, tokens(count)))
    return world


# ------------------------------------------------------------------ pipelines


def test_nothing_is_said_of_times_before_there_are_any() -> None:
    world = World()
    assert status(world).pipelines == ()
    world.linked(3)
    pipeline = only_pipeline(world)
    assert (pipeline.state, pipeline.epoch, pipeline.lineage) == ("serving", 1, 1)
    assert [str(stage.layers) for stage in pipeline.stages] == ["1-2", "3-4", "5-6"]
    assert all(stage.ready and stage.step_s is None for stage in pipeline.stages)
    assert (pipeline.round_trip_s, pipeline.slowest, pipeline.bubble_ratio) == (None, None, None)


def test_stages_that_load_are_told_from_those_that_are_ready() -> None:
    world = World()
    quick, slow = world.worker("quick"), world.worker("slow")
    slow.load_s = 1.0
    world.run(lambda: any(stage.ready for each in status(world).pipelines for stage in each.stages))
    pipeline = only_pipeline(world)
    assert pipeline.state == "loading"
    assert {stage.worker for stage in pipeline.stages if stage.ready} == {quick.worker_id}


def test_stage_times_are_those_of_the_workers() -> None:
    world = World()
    for worker in world.linked(3):
        worker.layer_s = 0.01
    slow = world.plan()[1]
    slow.layer_s = 0.04
    finish(world, world.client().submit(PROMPT, tokens(40)))
    pipeline = only_pipeline(world)
    for stage, worker in zip(pipeline.stages, world.plan(), strict=True):
        assert stage.step_s == pytest.approx(2 * worker.layer_s, rel=0.2)
        assert stage.predicted_s == pytest.approx(stage.step_s, rel=0.2)
        assert stage.compute_s >= 39 * 2 * worker.layer_s
    assert pipeline.slowest == 1
    assert pipeline.step_tokens == 1.0
    assert pipeline.round_trip_s == pytest.approx(0.12, rel=0.2)
    assert pipeline.outside_s is not None
    assert pipeline.round_trip_s is not None
    assert 0.002 < pipeline.outside_s < 0.02  # four messages of one to two milliseconds
    # One request alone: of three stages one works at a time.
    assert pipeline.bubble_ratio == pytest.approx(1 - 0.12 / (3 * pipeline.round_trip_s), abs=0.05)


def test_links_carry_the_activations_of_every_token_once() -> None:
    world = served(10)
    pipeline, counted = only_pipeline(world), status(world).counters
    assert [(link.sender, link.receiver) for link in pipeline.links] == [
        (before.worker_id, after.worker_id)
        for before, after in zip(world.plan()[:-1], world.plan()[1:], strict=True)
    ]
    sent_bytes = (len(PROMPT) + 9) * MODEL.activation_bytes
    assert [link.bytes_sent for link in pipeline.links] == [sent_bytes] * 2
    assert {link.how for link in pipeline.links} == {"direct"}
    assert all(link.latency_s and link.bytes_per_s for link in pipeline.links)
    assert counted.activation_bytes == 2 * sent_bytes
    assert counted.steps - counted.prompt_steps == 9  # one token of ten comes of the prompt


def test_the_kv_cache_of_a_worker_follows_its_layers() -> None:
    world = served()
    shown, pipeline = status(world), only_pipeline(world)
    assert pipeline.kv_tokens_cached > 0
    assert (pipeline.answers_running, pipeline.answers_decoding) == (0, 0)
    for worker in shown.workers:
        assert worker.layers
        token_bytes = MODEL.cost.kv_bytes(worker.layers)
        assert worker.kv_used_bytes == pipeline.kv_tokens_cached * token_bytes
        assert worker.kv_room_bytes == pipeline.kv_tokens * token_bytes


def test_a_move_is_shown_with_what_it_is_for_and_a_better_plan_before() -> None:
    world = World(with_settings(strategy="speed", objective="throughput", replicas=1))
    for name in ("a", "b"):
        worker = world.worker(name, ROOMY)
        worker.layer_s, worker.load_s = 0.01, 0.3
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    answers = [client.submit(list(range(n, n + 9)), tokens(200)) for n in range(4)]
    assert world.run(lambda: bool(answers[0].token_ids))
    assert only_pipeline(world).answers_running == 4
    assert only_pipeline(world).answers_decoding >= 1
    before, number = only_pipeline(world), status(world).events[-1].number
    world.worker("late", ROOMY).layer_s = 0.01
    better = []

    def moving() -> bool:
        pipeline = only_pipeline(world)
        if pipeline.forecast and pipeline.forecast.better:
            better.append(pipeline.forecast)
        return pipeline.move is not None

    assert world.run(moving)
    pipeline = only_pipeline(world)
    move = pipeline.move
    assert move
    assert (move.phase, pipeline.epoch) == ("loading", before.epoch)
    assert "faster" in move.why
    assert [held.worker for held in move.before] == [stage.worker for stage in before.stages]
    assert "late" in {held.worker for held in move.after}
    assert move.standstill_s > 0
    assert better[-1].better == move.after
    assert better[-1].better_tokens_per_s
    assert better[-1].better_tokens_per_s > better[-1].tokens_per_s > 0
    assert world.run(lambda: only_pipeline(world).move is None)
    after = only_pipeline(world)
    assert (after.lineage, after.epoch) == (before.lineage, move.epoch)
    finish(world, *answers)
    counted = status(world).counters
    assert counted.moves_begun["faster"] == counted.events["move_began"]
    assert counted.moved_bytes["faster"] > 0
    assert counted.moves_undone == 0
    new = [event.kind for event in status(world).events if event.number > number]
    assert "worker_joined" in new
    assert "move_committed" in new


# ------------------------------------------------------------------ counters


def test_a_loss_is_counted_with_what_came_of_it() -> None:
    world = World()
    victim, *_ = world.linked(3, ROOMY)
    client = world.client()
    answers = [client.submit(PROMPT, tokens(20)) for _ in range(3)]
    assert world.run(lambda: all(len(answer.token_ids) > 2 for answer in answers))
    before = status(world)
    victim.kill()
    finish(world, *answers)
    after = status(world)
    assert after.counters.recovered == 3
    assert after.counters.replans["recovery"] == 1
    assert after.counters.retries["step_lost"] == 3
    assert after.counters.events["worker_lost"] == 1
    assert sum(after.latencies.queue.counts) == 3  # nobody arrived twice
    lost = next(event for event in after.events if event.kind == "worker_lost")
    assert (lost.worker, lost.level, lost.times) == (victim.worker_id, "warning", 1)
    assert lost.number > before.events[-1].number
    assert 0 < lost.age_s < after.counters.uptime_s
    numbers = [event.number for event in after.events]
    assert numbers == sorted(set(numbers))


def test_how_requests_ended_and_what_they_took() -> None:
    world = World()
    world.linked(3, ROOMY)
    client = world.client()
    answers = [client.submit(PROMPT, tokens(5)), client.submit([1, 2, 3], tokens(7))]
    finish(world, *answers)
    client.submit([10**6], tokens(1))  # no such token
    gone = client.submit(PROMPT, tokens(90))
    assert world.run(lambda: len(gone.token_ids) > 1)
    client.cancel("r3")
    assert world.run(world.all_ended)
    shown = status(world)
    assert (shown.requests_finished, shown.requests_cancelled, shown.requests_failed) == (2, 1, 1)
    assert shown.counters.failures == {"invalid_request": 1}
    assert shown.counters.prompt_tokens == 2 * len(PROMPT) + 3
    assert shown.counters.prefix_query_tokens == 2 * len(PROMPT) + 3
    assert shown.prefix_hit_tokens == len(PROMPT) - 1
    times = shown.latencies
    assert [sum(each.counts) for each in (times.queue, times.first_token, times.whole)] == [3, 3, 2]
    assert sum(times.between_tokens.counts) == shown.tokens_generated - 3
    assert times.first_token.sum_s > times.queue.sum_s
    assert times.whole.sum_s >= max(answer_s(times.whole), 0.01)


def answer_s(histogram: Histogram) -> float:
    """Return the least sum that the counts of a histogram allow."""
    lows = (0.0, *histogram.bounds_s)
    return sum(low * count for low, count in zip(lows, histogram.counts, strict=True))


def test_a_failed_step_and_a_late_result_are_counted() -> None:
    world = World()
    world.linked(2)
    world.faults.append(Fault(TaskResult, "duplicate"))
    finish(world, world.client().submit(PROMPT, tokens(5)))
    assert status(world).rejected["late_result"] == 1
