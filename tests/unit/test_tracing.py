"""What a request that asks for it is told of the steps that made its tokens."""

import pytest

from distributed_llm.common.messages import MAX_TRACED, Finished, StageTime, StepTrace
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.tracing import trace_step
from distributed_llm.summary import headline
from tests.unit.fake_client import Answer
from tests.unit.fake_model import MODEL, with_sources
from tests.unit.simulation import World, finish, with_settings

ROOMY = 4000
"""Memory with which three workers have room for more than any test needs."""

LAYER_S = 0.01
PROMPT = tuple(range(1, 41))


def traced(count: int, **others: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, trace=True, **others)  # type: ignore[arg-type]


def cluster() -> World:
    world = World(with_settings(max_batch_tokens=16))
    for worker in world.linked(3, ROOMY):
        worker.layer_s = LAYER_S
    return world


def made(answer: Answer) -> list[StepTrace]:
    """Return the steps that sampled the tokens of an answer."""
    return [step for step in answer.trace if step.sampled]


def test_the_way_of_one_token_through_all_stages() -> None:
    world = cluster()
    answer = world.client().submit(PROMPT, traced(6))
    finish(world, answer)
    plan = world.plan()
    assert [step.index for step in made(answer)] == list(range(6))
    last = answer.trace[-1]
    assert (last.start, last.tokens, last.step_tokens, last.step_sequences) == (44, 1, 1, 1)
    assert last.epoch == world.epoch
    assert [hop.worker for hop in last.hops] == [worker.worker_id for worker in plan]
    assert [hop.layers for hop in last.hops] == [w.stage.layers for w in plan if w.stage]
    assert [hop.bytes_in for hop in last.hops] == [4, *[MODEL.activation_bytes] * 2]
    assert all(hop.compute_s >= 2 * LAYER_S for hop in last.hops)
    inside_s = sum(hop.compute_s + hop.queued_s for hop in last.hops)
    assert last.took_s == pytest.approx(inside_s + last.outside_s)
    assert last.hops[0].link_s is None
    links_s = [hop.link_s or 0.0 for hop in last.hops[1:]]
    assert all(0.0 < link_s < 0.01 for link_s in links_s)
    assert sum(links_s) <= last.outside_s
    arrival_s = answer.token_times[-1] - answer.sent_at
    assert last.began_s + last.took_s == pytest.approx(arrival_s, abs=0.01)


def test_the_steps_of_a_prompt_come_with_its_first_token() -> None:
    world = cluster()
    answer = world.client().submit(PROMPT, traced(3))
    world.run(lambda: bool(answer.token_ids))
    assert all(step.index == 0 for step in answer.trace)
    assert [step.sampled for step in answer.trace] == [False] * (len(answer.trace) - 1) + [True]
    assert len(answer.trace) >= 3
    computed = [at for step in answer.trace for at in range(step.start, step.start + step.tokens)]
    assert computed == list(range(len(PROMPT)))
    began = [step.began_s for step in answer.trace]
    assert began == sorted(began)
    first = answer.trace[0]
    assert first.hops[1].bytes_in == first.step_tokens * MODEL.activation_bytes
    finish(world, answer)


def test_answers_of_an_encoder_decoder_go_by_stages_that_write_them() -> None:
    """Two layers of six are the encoder's, which the first of three workers has."""
    world = World(with_settings(max_batch_tokens=64), model=with_sources(MODEL))
    for worker in world.linked(3, ROOMY):
        worker.layer_s = LAYER_S
    answer = world.client().submit(PROMPT, traced(6))
    finish(world, answer)
    encoder, *decoder = (worker.worker_id for worker in world.plan())
    source, *written = answer.trace
    assert (source.start, source.tokens, source.sampled) == (0, len(PROMPT), False)
    assert [hop.worker for hop in source.hops] == [encoder, *decoder]
    assert [step.start for step in written] == list(range(len(PROMPT), len(PROMPT) + 6))
    for step in written:
        assert [hop.worker for hop in step.hops] == decoder
        assert [hop.bytes_in for hop in step.hops] == [4, MODEL.activation_bytes]
        assert step.hops[0].link_s is None
        assert step.hops[1].link_s
    status = world.core.status(now=world.now)
    (pipeline,) = status.pipelines
    assert "(6 layers, 2 of them the encoder's): serving" in headline(status)
    planned = next(event.text for event in status.events if event.text.startswith("loading plan"))
    assert f"encoder 1-2 on {encoder}, decoder 1-2 on {decoder[0]}, decoder 3-4 on" in planned
    assert [stage.step_s == 0.0 for stage in pipeline.stages] == [True, False, False]
    tokens = [link.bytes_sent // MODEL.activation_bytes for link in pipeline.links]
    assert tokens == [len(PROMPT), len(PROMPT) + 6]
    assert isinstance(answer.end, Finished)
    tasks = {stage.worker: stage.tasks for stage in answer.end.timings.stages}
    assert tasks == {encoder: 1, **dict.fromkeys(decoder, 7)}


def test_a_step_that_is_shared_says_so_and_only_who_asks_is_told() -> None:
    world = cluster()
    client = world.client()
    quiet = client.submit(PROMPT, SamplingParams(max_new_tokens=30, ignore_eos=True))
    answer = client.submit(PROMPT[::-1], traced(30))
    finish(world, quiet, answer)
    assert quiet.trace == []
    assert max(step.step_tokens for step in answer.trace) > 1
    assert {step.step_sequences for step in answer.trace} <= {1, 2}


def test_each_of_n_answers_has_its_own() -> None:
    world = cluster()
    answer = world.client().submit(PROMPT, traced(4, n=3, seed=5))
    finish(world, answer)
    for one in answer.all:
        assert [step.index for step in made(one)] == [0, 1, 2, 3]


def test_what_is_computed_again_after_a_loss_is_shown() -> None:
    world = cluster()
    answer = world.client().submit(PROMPT, traced(20))
    world.run(lambda: len(answer.token_ids) == 10)
    before = world.epoch
    world.plan()[1].kill()
    finish(world, answer)
    assert [step.index for step in made(answer)] == list(range(20))
    again = [step for step in answer.trace if step.epoch > before and step.start < len(PROMPT)]
    assert again
    assert {step.index for step in again} <= {10, 11, 12}
    assert {len(step.hops) for step in again} == {2}


def test_a_step_comes_with_its_token_and_not_with_the_one_before() -> None:
    world = World(text_delay_s=0.1)
    world.linked(3, ROOMY)
    answer = world.client().submit(PROMPT, traced(10))
    finish(world, answer)
    assert [step.index for step in made(answer)] == list(range(10))


def test_an_answer_that_gave_way_is_told_of_the_tokens_that_are_computed_again() -> None:
    world = World()
    world.linked(3)
    client = world.client()
    answers = [client.submit([n], traced(100)) for n in range(2)]
    finish(world, *answers)
    assert world.core.status(now=world.now).preemptions
    assert all([step.index for step in made(one)] == list(range(100)) for one in answers)
    assert [step.tokens for step in answers[1].trace if step.tokens > 1]


def test_of_a_long_way_the_latest_steps_are_reported() -> None:
    world = World(with_settings(max_batch_tokens=1))
    world.linked(3, ROOMY)
    answer = world.client().submit([3] * (MAX_TRACED + 20), traced(2))
    world.run(lambda: bool(answer.token_ids))
    assert len(answer.trace) == MAX_TRACED
    assert answer.trace[-1].sampled
    finish(world, answer)


def test_a_step_of_a_kv_cache_that_was_given_up_is_not_reported() -> None:
    world = cluster()
    world.client().submit(PROMPT, traced(20))
    pipeline = world.core._pipelines.all[0]
    assert world.run(lambda: bool(pipeline.in_flight and pipeline.in_flight.steps))
    assert pipeline.in_flight
    step = pipeline.in_flight.steps[0]
    times = (StageTime(compute_us=1, layers_us=1, queued_us=1),) * 3
    done = StepDone(step, [], [], times, 1, 0.1)
    trace_step(world.core._cluster, pipeline, done, now=world.now)
    (answer,) = step.answers
    assert len(answer.trace) == 1
    answer.sequence_id = SequenceId(99)
    trace_step(world.core._cluster, pipeline, done, now=world.now)
    assert len(answer.trace) == 1
