"""The core in a simulated cluster: who comes, what is served, who is turned away."""

from dataclasses import replace

import pytest

from distributed_llm.common.errors import (
    CheckpointMismatch,
    ProtocolMismatch,
    RemoteProtocolError,
    StageError,
    UnsupportedModel,
)
from distributed_llm.common.messages import (
    Cancel,
    ClientWelcome,
    Finished,
    FromClient,
    FromWorker,
    Generate,
    GetStatus,
    Goodbye,
    Heartbeat,
    LinkReport,
    Ping,
    Pong,
    Refused,
    RequestFailed,
    StageReady,
    StageTime,
    StatusReport,
    Task,
    TaskFailed,
    TaskResult,
    WorkerHello,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import KV_BLOCK, Epoch, LayerRange, PeerId, StepNumber
from distributed_llm.coordinator import events
from distributed_llm.coordinator.core import Core
from tests.unit.fake_model import BIG, MODEL, reference
from tests.unit.fake_worker import capabilities
from tests.unit.simulation import LONG, SETTINGS, Fault, World, finish, with_settings

# ------------------------------------------------------------------ serving


def test_workers_join_load_and_serve() -> None:
    world = World()
    workers = world.serving(3)
    status = world.core.status(now=world.now)
    assert [w.name for w in status.workers] == ["w0", "w1", "w2"]
    assert [w.layers for w in status.workers] == [
        LayerRange(0, 2),
        LayerRange(2, 4),
        LayerRange(4, 6),
    ]
    assert all(w.state == "serving" and w.weight_bytes for w in status.workers)
    assert (status.epoch, status.kv_tokens) == (1, 2 * KV_BLOCK)
    client = world.client()
    answers = [client.submit(LONG), client.submit((5,)), client.submit((9, 9, 9))]
    finish(world, *answers)
    status = world.core.status(now=world.now)
    assert (status.requests_finished, status.requests_failed) == (3, 0)
    assert status.tokens_generated == sum(len(a.token_ids) for a in answers)
    assert all(w.tasks_done and w.seconds_per_token for w in status.workers)
    assert [w.name for w in world.plan()] == [w.name for w in workers]


def test_batches_share_steps_and_prompts_come_in_chunks() -> None:
    world = World()
    first, *_ = world.serving(3)
    tasks: list[Task] = []
    first.before_task = tasks.append
    client = world.client()
    answers = [client.submit(LONG), *(client.submit((i, i + 1)) for i in range(8))]
    finish(world, *answers)
    assert all(sum(part.num_tokens for part in task.sequences) <= 8 for task in tasks)
    assert max(len(task.sequences) for task in tasks) >= 2
    parts = [part for task in tasks for part in task.sequences]
    long = [part for part in parts if part.sequence_id == parts[0].sequence_id]
    assert [(part.start, part.num_tokens) for part in long[:2]] == [(0, 8), (8, 8)]
    assert sum(part.num_tokens for part in long if part.start < len(LONG)) == len(LONG)
    assert sum(part.sample for part in long) == len(answers[0].token_ids)
    assert sum(part.sampling is not None for part in long) == 1  # they travel once


def test_timings_and_usage_are_reported() -> None:
    world = World()
    world.serving(3)
    answer = world.client().submit(LONG)
    finish(world, answer)
    assert isinstance(answer.end, Finished)
    timings = answer.end.timings
    assert [s.layers for s in timings.stages] == [
        LayerRange(0, 2),
        LayerRange(2, 4),
        LayerRange(4, 6),
    ]
    assert all(s.tasks == 3 + len(answer.token_ids) - 1 for s in timings.stages)
    assert timings.first_token_s > 0 < timings.decode_s


def test_same_seed_same_answer_in_any_company() -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)
    world = World()
    world.serving(2)
    client = world.client()
    alone = client.submit((7, 8), params)
    finish(world, alone)
    together = [client.submit((7, 8), params), client.submit(LONG), client.submit((1,))]
    finish(world, *together)
    assert together[0].token_ids == alone.token_ids


def test_min_new_tokens_and_ignore_eos() -> None:
    prompt = next(
        (a, b)
        for a in range(90)
        for b in range(90)
        if len(reference((a, b), SamplingParams(max_new_tokens=9))) < 4
    )
    world = World()
    world.serving(2)
    client = world.client()
    plain = client.submit(prompt, SamplingParams(max_new_tokens=9))
    longer = client.submit(prompt, SamplingParams(max_new_tokens=9, min_new_tokens=6))
    through = client.submit(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))
    finish(world, plain, longer, through)
    assert plain.finish_reason == "stop"
    assert len(longer.token_ids) >= 6
    assert through.finish_reason == "length"


# ------------------------------------------------------------------ no capacity


def test_nobody_there_is_not_ready() -> None:
    world = World()
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"
    assert world.state == "waiting"


def test_too_little_memory_is_not_ready_and_says_why() -> None:
    world = World()
    world.worker("w0")
    world.run(for_s=2.0)
    assert world.state == "waiting"
    assert "are missing" in world.core.status(now=world.now).note
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"


def test_loss_without_spare_fails_what_runs_and_a_joiner_mends_it() -> None:
    world = World()
    survivor, victim = world.serving(2)
    client = world.client()
    answers = [client.submit(LONG), client.submit()]
    world.run(lambda: len(answers[0].token_ids) == 2)
    victim.kill()
    assert world.run(lambda: all(a.end is not None for a in answers), for_s=1.0)
    assert {a.code for a in answers} == {"worker_lost"}
    world.run(for_s=0.1)
    assert survivor.stage is None
    assert world.state == "waiting"
    world.worker("w2")
    assert world.run(lambda: world.state == "serving", for_s=2.0)
    finish(world, client.submit(LONG))


def test_answer_whose_last_token_is_known_survives_the_loss_of_all_workers() -> None:
    world = World(text_delay_s=0.05)
    workers = world.serving(2)
    answer = world.client().submit((1, 2, 3), SamplingParams(max_new_tokens=2, ignore_eos=True))
    world.run(lambda: world.core.status(now=world.now).tokens_generated == 2)
    assert answer.end is None
    for worker in workers:
        worker.kill()
    assert world.run(lambda: world.state == "waiting")
    world.run(lambda: answer.end is not None)
    assert isinstance(answer.end, Finished)
    answer.check()


def test_request_that_no_longer_fits_after_a_loss_fails_alone() -> None:
    world = World()
    *_, victim = world.serving(3)
    client = world.client()
    big = client.submit((1,), SamplingParams(max_new_tokens=120, ignore_eos=True))
    small = client.submit((2,), SamplingParams(max_new_tokens=30, ignore_eos=True))
    world.run(lambda: len(small.token_ids) == 3)
    victim.kill()
    finish(world, small)
    assert big.code == "not_enough_memory"
    assert big.token_ids == big.expected()[: len(big.token_ids)]


def test_min_workers_are_waited_for() -> None:
    world = World(with_settings(min_workers=3))
    for i in range(2):
        world.worker(f"w{i}")
    world.run(for_s=3.0)
    assert world.state == "waiting"
    assert "2 of 3 workers can serve so far" in world.core.status(now=world.now).note
    world.worker("w2")
    assert world.run(lambda: world.state == "serving", for_s=2.0)
    world.workers[0].kill()  # it counts at the start only
    finish(world, world.client().submit())


# ------------------------------------------------------------------ workers join


def test_joiner_is_used_once_nothing_runs() -> None:
    world = World(with_settings(settle_s=0.01))
    world.serving(2)
    client = world.client()
    answer = client.submit(LONG, SamplingParams(max_new_tokens=40, ignore_eos=True))
    world.run(lambda: len(answer.token_ids) == 2)
    world.worker("w2")
    world.run(lambda: len(answer.token_ids) == 20)
    world.faults.append(Fault(Task, "drop"))  # timers run
    world.run(lambda: len(answer.token_ids) == 38)
    assert world.epoch == 1
    said = "w2: the coordinator says: no layers yet: they are dealt anew once no request runs"
    assert world.logs.count(said) == 1
    finish(world, answer)
    assert world.run(lambda: world.epoch == 2 and world.state == "serving", for_s=2.0)
    assert len(world.plan()) == 3
    finish(world, client.submit(LONG))


def test_workers_that_settle_together_are_planned_once() -> None:
    world = World()
    for i in range(4):
        world.worker(f"w{i}")
        world.run(for_s=0.3)
    assert world.run(lambda: world.state == "serving")
    assert world.epoch == 1
    assert len(world.plan()) == 4


def test_joiner_that_changes_nothing_leaves_the_plan() -> None:
    world = World(with_settings(strategy="custom", layers={"w0": LayerRange(0, 6)}))
    world.worker("w0", 2000)
    assert world.run(lambda: world.state == "serving")
    world.worker("w1")
    world.run(for_s=3.0)
    assert world.epoch == 1


def test_same_name_twice_gets_a_number() -> None:
    world = World()
    twins = [world.worker("pc", 600), world.worker("pc", 600)]
    assert world.run(lambda: world.state == "serving")
    assert sorted(w.worker_id for w in twins) == ["pc", "pc-2"]


@pytest.mark.parametrize("strategy", ["custom", "memory", "speed"])
def test_a_machine_that_lost_power_has_its_name_again_once_the_old_session_is_lost(
    strategy: str,
) -> None:
    layers = {"w0": LayerRange(0, 3), "w1": LayerRange(3, 6)} if strategy == "custom" else {}
    world = World(with_settings(strategy=strategy, layers=layers))
    _, victim = world.serving(2)
    victim.kill(silently=True)
    back = world.worker("w1", BIG)
    assert world.run(lambda: back.worker_id == "w1-2", for_s=1.0)
    assert world.run(lambda: back.worker_id == "w1", for_s=4.0)
    assert world.run(lambda: world.state == "serving" and back in world.plan(), for_s=2.0)
    assert world.run(lambda: world.links == ["direct"], for_s=2.0), "it proves to be who it is"
    assert "worker w1-2 is called w1 now: that name is free again" in world.logs
    finish(world, world.client().submit(LONG))


def test_a_layer_map_waits_for_a_name_that_an_old_session_without_layers_has() -> None:
    world = World(
        with_settings(strategy="custom", layers={"w0": LayerRange(0, 3), "w1": LayerRange(3, 6)})
    )
    world.worker("w0")
    old = world.worker("w1")
    old.load_error = StageError("its disk is broken")
    assert world.run(lambda: old.num_loads == 1 and world.state == "waiting")
    old.kill(silently=True)
    back = world.worker("w1")
    assert world.run(lambda: back.worker_id == "w1-2", for_s=1.0)
    assert world.run(lambda: back.worker_id == "w1", for_s=4.5)
    assert world.run(lambda: world.state == "serving", for_s=2.0)
    finish(world, world.client().submit(LONG))


def test_a_name_is_given_back_once_its_worker_has_no_layers() -> None:
    """While it serves it keeps the other one, by which its neighbours know it."""
    world = World()
    first = world.worker("pc")
    world.run(for_s=0.01)
    second = world.worker("pc")
    assert world.run(lambda: world.state == "serving")
    third = world.worker("pc", 1)
    assert world.run(lambda: third.worker_id == "pc-3", for_s=2.0)
    assert [first.worker_id, second.worker_id] == ["pc", "pc-2"]
    first.kill()
    assert world.run(lambda: second.worker_id == "pc", for_s=1.0)
    world.run(for_s=1.0)
    assert third.worker_id == "pc-3", "the first to come is the first to be served"


def test_worker_that_is_back_before_it_was_missed_keeps_its_name_and_its_layers() -> None:
    """The layer map names it; its old connection is not known to be lost."""
    world = World(
        with_settings(strategy="custom", layers={"w0": LayerRange(0, 2), "w1": LayerRange(2, 6)})
    )
    worker, _ = world.worker("w0", 2000), world.worker("w1", 2000)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    answer = client.submit((1, 2, 3), SamplingParams(max_new_tokens=40, ignore_eos=True))
    world.run(lambda: len(answer.token_ids) > 3)
    worker.lose_connection()
    finish(world, client.submit(), answer)
    assert (worker.num_sessions, worker.worker_id) == (2, "w0")


def test_requests_wait_while_layers_load() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(2)]
    for worker in workers:
        worker.load_s = 20.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answer = client.submit()
    world.run(for_s=10.0)
    assert answer.end is None
    finish(world, answer)


# ------------------------------------------------------------------ layers cannot be loaded


def test_worker_that_cannot_load_is_left_out() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    workers[1].load_error = StageError("out of memory")
    assert world.run(lambda: world.state == "serving")
    by_name = {w.name: w for w in world.core.status(now=world.now).workers}
    assert by_name["w1"].state == "unfit"
    assert by_name["w1"].note == "out of memory. It may be given layers again in 10 s."
    assert [w.name for w in world.plan()] == ["w0", "w2"]
    finish(world, world.client().submit())


def test_worker_with_other_weights_leaves_and_the_rest_serve() -> None:
    world = World()
    workers = [world.worker(f"w{i}") for i in range(3)]
    workers[1].load_error = CheckpointMismatch("other weights")
    assert world.run(lambda: world.state == "serving")
    assert isinstance(workers[1].exit, CheckpointMismatch)
    finish(world, world.client().submit())


def test_nobody_can_load_is_not_ready() -> None:
    world = World()
    for i in range(2):
        world.worker(f"w{i}").load_error = StageError("out of memory")
    world.run(for_s=5.0)
    assert world.state == "waiting"
    answer = world.client().submit()
    world.run(lambda: answer.end is not None)
    assert answer.code == "not_ready"


def test_model_that_cannot_be_split_stops_the_coordinator() -> None:
    world = World()
    for i in range(2):
        world.worker(f"w{i}").load_error = UnsupportedModel("no such attention")
    world.run(lambda: world.stopped is not None, for_s=5.0)
    assert isinstance(world.stopped, UnsupportedModel)
    assert "no such attention" in str(world.stopped)
    assert str(world.stopped).endswith("Worker w0 found that.")
    assert not any("worker w0 cannot serve" in line for line in world.logs), "it is said once"


# ------------------------------------------------------------------ strangers


def test_strangers_are_told_to_connect_again() -> None:
    world = World()
    world.serving(2)
    messages: list[FromWorker | FromClient] = [
        Ping(),
        Cancel(request_id="x"),
        GetStatus(),
        Heartbeat(
            epochs=(Epoch(1),), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0
        ),
        StageReady(epoch=Epoch(1), credits=2, load_s=0.0, kv_tokens=99, weight_bytes=0),
        TaskResult(
            epoch=Epoch(1),
            step=StepNumber(1),
            timings=(StageTime(compute_us=1, layers_us=0, queued_us=0),),
        ),
        TaskFailed(epoch=Epoch(1), step=StepNumber(1), code="x", message="x"),
        LinkReport(epoch=Epoch(1), up=True),
    ]
    for message in messages:
        actions = world.core.handle(events.Received(PeerId(b"?"), message), now=world.now)
        (send,) = [a for a in actions if isinstance(a, events.Send)]
        assert send.peer == b"?"
        assert isinstance(send.message, Refused)
        assert send.message.code == "lost"
    assert world.rejected["bad_state"] == len(messages)
    assert world.core.handle(events.Received(PeerId(b"?"), Goodbye()), now=world.now) == []
    world.core.validate()


def test_workers_may_not_ask_and_clients_may_not_work() -> None:
    world = World()
    worker, _ = world.serving(2)
    client = world.client()
    world.run(for_s=0.1)
    questions: list[tuple[PeerId, FromWorker | FromClient]] = [
        (worker.link.peer, GetStatus()),
        (
            client.link.peer,
            StageReady(epoch=Epoch(1), credits=2, load_s=0.0, kv_tokens=99, weight_bytes=0),
        ),
    ]
    for peer, message in questions:
        (send,) = world.core.handle(events.Received(peer, message), now=world.now)
        assert isinstance(send, events.Send)
        assert isinstance(send.message, Refused)
    hello = WorkerHello(name="x", instance="y", capabilities=capabilities())
    assert world.core.handle(events.Received(client.link.peer, hello), now=world.now) == []


def test_garbage_is_counted_and_harms_nobody() -> None:
    world = World()
    worker, _ = world.serving(2)
    answer = world.client().submit(LONG)
    world.run(lambda: len(answer.token_ids) == 2)
    error = RemoteProtocolError("malformed", "noise")
    for peer in (worker.link.peer, PeerId(b"?")):
        actions = world.apply(events.Garbage(peer, "malformed", error))
        assert [type(a) for a in actions] == [events.Log]
    assert world.rejected["malformed"] == 2
    finish(world, answer)


def test_other_protocol_version_is_refused_by_name() -> None:
    world = World()
    error = ProtocolMismatch("version 2")
    actions = world.core.handle(events.Garbage(PeerId(b"?"), error.code, error), now=world.now)
    (send,) = [a for a in actions if isinstance(a, events.Send)]
    assert isinstance(send.message, Refused)
    assert send.message.code == "unsupported_version"
    assert world.rejected["unsupported_version"] == 1


def test_client_is_welcomed_and_answered() -> None:
    world = World()
    client = world.client()
    client.say(GetStatus())
    world.run(for_s=1.0)
    assert [type(m) for m in client.others] == [ClientWelcome, Pong, StatusReport]


def test_silent_client_is_forgotten_and_told_so_when_it_speaks() -> None:
    world = World()
    client = world.client()
    world.run(for_s=1.0)
    peer = client.link.peer
    client.vanish(silently=True)
    world.run(for_s=31.0)
    (send,) = world.core.handle(events.Received(peer, Ping()), now=world.now)
    assert isinstance(send, events.Send)
    assert isinstance(send.message, Refused)
    assert send.message.code == "lost"


def test_a_prompt_that_no_context_can_hold_is_not_even_tokenized() -> None:
    world = World()
    world.serving(3)
    client = world.client()
    world.run(for_s=1.0)
    spec, frame = frame_of_token_ids([1] * 20_000)
    ask = Generate(request_id="big", prompt="token_ids", params=SamplingParams(), tensors=(spec,))
    actions = world.apply(events.Received(client.link.peer, ask, (frame,)))
    (refusal,) = [a.message for a in actions if isinstance(a, events.Send)]
    assert isinstance(refusal, RequestFailed)
    assert refusal.code == "context_length_exceeded"
    assert not any(isinstance(a, events.Tokenize) for a in actions)


def test_a_bug_in_planning_is_told_once_with_where_it_is_and_to_those_who_wait() -> None:
    world = World()
    world.question_s = 1e9
    world.worker("w0")
    world.run(for_s=5.0)
    assert world.core._replanning._open
    _, question = world.core._replanning._open
    world.logs.clear()
    world.apply(
        events.StudyFailed(question, "KeyError('x')", "File plan.py, line 1\nKeyError: 'x'")
    )
    trace, waiting = world.logs
    assert trace == "making a plan failed: File plan.py, line 1\nKeyError: 'x'"
    assert waiting == "waiting: Making a plan failed: KeyError('x'). Please report it."


def test_what_a_checkpoint_says_and_nobody_follows_is_told_once_at_the_start() -> None:
    defaults = replace(MODEL.defaults, not_followed=("num_beams", "guidance_scale"))
    core = Core(replace(MODEL, defaults=defaults), SETTINGS, draw_seed=lambda: 1)
    (log,) = core.start(now=1.0)
    assert isinstance(log, events.Log)
    assert log.level == "warning"
    assert "the model's settings of generation have num_beams, guidance_scale" in log.text
    assert [event.text for event in core.status(now=2.0).events] == [log.text]
    assert Core(MODEL, SETTINGS, draw_seed=lambda: 1).start(now=1.0) == []
