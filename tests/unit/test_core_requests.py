"""The core in a simulated cluster: requests, how they end, and who is next."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from distributed_llm.common.messages import (
    Cancel,
    Generate,
    RequestFailed,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_token_ids
from tests.unit.fake_client import Answer, SimClient, text_of
from tests.unit.fake_model import CONTEXT, reference
from tests.unit.simulation import LONG, World, finish, with_settings

# ------------------------------------------------------------------ stop strings


@pytest.mark.parametrize("text_delay_s", [0.0, 0.02])
@pytest.mark.parametrize("span", [(3, 4), (2, 5), (0, 2)])
def test_stop_string_ends_the_answer_before_it(span: tuple[int, int], text_delay_s: float) -> None:
    whole = reference((1, 2, 3), SamplingParams(max_new_tokens=8, ignore_eos=True))
    stop = text_of(whole[span[0] : span[1]])
    world = World(text_delay_s=text_delay_s)
    world.serving(3)
    client = world.client()
    params = SamplingParams(max_new_tokens=8, stop_strings=(stop,), ignore_eos=True)
    answer, other = client.submit((1, 2, 3), params), client.submit(LONG)
    finish(world, answer, other)
    assert answer.finish_reason == "stop"
    assert answer.text == text_of(whole[: span[0]])
    assert len(answer.token_ids) == span[1]


def test_unfinished_stop_string_is_given_out_at_the_end() -> None:
    whole = reference((1, 2, 3), SamplingParams(max_new_tokens=8, ignore_eos=True))
    params = SamplingParams(
        max_new_tokens=8, stop_strings=(text_of([whole[-1], 1, 2]),), ignore_eos=True
    )
    world = World()
    world.serving(2)
    answer = world.client().submit((1, 2, 3), params)
    finish(world, answer)
    assert (answer.text, answer.finish_reason) == (text_of(whole), "length")


# ------------------------------------------------------------------ admission


def test_full_queue_is_overloaded() -> None:
    world = World(with_settings(max_waiting_requests=3))
    workers = [world.worker(f"w{i}") for i in range(2)]
    workers[0].load_s = 5.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answers = [client.submit() for _ in range(5)]
    world.run(lambda: answers[4].end is not None, for_s=0.1)
    assert [a.code for a in answers] == ["", "", "", "overloaded", "overloaded"]
    assert answers[4].end is not None
    assert getattr(answers[4].end, "retry_after_s") >= 1.0  # noqa: B009
    finish(world, *answers[:3])


def test_requests_beyond_the_kv_cache_wait_in_order() -> None:
    world = World()
    world.serving(3)  # room for two blocks of positions
    client = world.client()
    params = SamplingParams(max_new_tokens=38, ignore_eos=True)
    answers = [client.submit((i,), params) for i in range(6)]
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, world.core.status(now=world.now).answers_running)
        return world.all_ended()

    assert world.run(done)
    assert most == 2
    assert [a.ended_at for a in answers] == sorted(a.ended_at for a in answers)
    finish(world, *answers)


def test_too_long_requests_are_refused_with_both_numbers() -> None:
    world = World()
    world.serving(2)
    client = world.client()
    context = client.submit((1, 2), SamplingParams(max_new_tokens=CONTEXT))
    memory = client.submit((1, 2), SamplingParams(max_new_tokens=100))
    empty_range = client.submit((1,), SamplingParams(max_new_tokens=2, min_new_tokens=3))
    strange = client.submit((1, 97))
    world.run(world.all_ended)
    assert [a.code for a in (context, memory, empty_range, strange)] == [
        "context_length_exceeded",
        "not_enough_memory",
        "invalid_request",
        "invalid_request",
    ]
    finish(world, client.submit())


# ------------------------------------------------------------------ cancel, vanish


def submitted_and(
    world: World, act: Callable[[SimClient], None], *, at_token: int
) -> tuple[Answer, Answer]:
    """Return a request on which `act` was done at some token, and another one of another client."""
    client, bystander = world.client(), world.client()
    answer = client.submit(LONG)
    other = bystander.submit((4, 5))
    assert world.run(lambda: len(answer.token_ids) >= at_token)
    act(client)
    return answer, other


@pytest.mark.parametrize("at_token", range(8))
@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.003, 0.0055, 0.008, 0.012])
def test_cancel_frees_every_stage(at_token: int, wait_s: float) -> None:
    world = World()
    world.serving(3)

    def cancel(client: SimClient) -> None:
        world.run(for_s=wait_s)
        client.cancel("r0")

    answer, other = submitted_and(world, cancel, at_token=at_token)
    finish(world, other)
    if answer.code:
        assert answer.code == "cancelled"
    answer.check()
    assert not any("failed a step" in line for line in world.logs)  # freed too early


@pytest.mark.parametrize("at_token", [0, 3])
@pytest.mark.parametrize("silently", [False, True])
def test_vanished_client_frees_every_stage(at_token: int, silently: bool) -> None:
    world = World()
    world.serving(3)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    client, bystander = world.client(), world.client()
    answer, other = client.submit(LONG, params), bystander.submit((4, 5))
    assert world.run(lambda: world.checker.num_arrived == 2 and len(answer.token_ids) >= at_token)
    client.vanish(silently=silently)
    finish(world, other)
    world.run(for_s=40.0)
    world.check_drained()
    status = world.core.status(now=world.now)
    assert (status.requests_failed, status.requests_cancelled) == (0, not silently)


def test_cancel_while_waiting_and_of_nothing() -> None:
    world = World()
    workers = [world.worker("w0"), world.worker("w1")]
    workers[0].load_s = 5.0
    world.run(lambda: world.state == "loading")
    client = world.client()
    answer = client.submit()
    world.run(for_s=0.5)
    client.cancel("r0")
    client.say(Cancel(request_id="unknown"))
    world.run(lambda: answer.end is not None, for_s=0.5)
    assert answer.code == "cancelled"
    status = world.core.status(now=world.now)
    assert (status.requests_failed, status.requests_cancelled) == (0, 1)
    finish(world)


def test_id_of_a_cancelled_request_is_used_again_at_once() -> None:
    """What is still under way for the first must not end up in the second."""
    world = World(text_delay_s=0.01)
    world.serving(2)
    client = world.client()
    first = client.submit((1, 2, 3), request_id="again")
    client.cancel("again")
    second = Answer((4, 5, 6, 7), SamplingParams(max_new_tokens=8))
    spec, frame = frame_of_token_ids(second.prompt)
    client.say(
        Generate(request_id="again", prompt="token_ids", params=second.params, tensors=(spec,)),
        (frame,),
    )
    world.run(lambda: first.end is not None)
    assert first.code == "cancelled"
    client.answers["again"] = second
    finish(world, second)


@pytest.mark.parametrize("at_token", range(1, 7))
def test_id_is_used_again_while_text_is_under_way(at_token: int) -> None:
    world = World(text_delay_s=0.004)
    world.serving(2)
    client = world.client()
    first = client.submit(LONG, request_id="again")
    world.run(lambda: len(first.token_ids) == at_token)
    client.cancel("again")
    world.run(lambda: first.end is not None)
    second = client.submit((4, 5, 6, 7), request_id="again")
    finish(world, second)


def held_anywhere(world: World) -> bool:
    """Return whether any stage holds KV cache."""
    return any(worker.stage and worker.stage.kv for worker in world.workers)


@pytest.mark.parametrize("how", ["cancel", "vanish"])
@pytest.mark.parametrize("wait_s", [0.0, 0.03, 0.07, 0.1, 0.17, 0.25, 0.5])
def test_kv_cache_is_freed_on_every_stage_within_one_step(how: str, wait_s: float) -> None:
    world = World()
    for worker in world.linked(3, 2000):
        worker.task_s = 0.1
    client = world.client()
    client.submit(LONG, SamplingParams(max_new_tokens=60, ignore_eos=True))
    assert world.run(lambda: held_anywhere(world))
    world.run(for_s=wait_s)
    if how == "cancel":
        client.cancel("r0")
    else:
        client.vanish()
    assert world.run(lambda: not held_anywhere(world), for_s=3 * 3 * 0.1 + 0.02)
    assert world.core.status(now=world.now).kv_tokens_used == 0
    world.run(for_s=1.0)
    assert not held_anywhere(world)


@pytest.mark.parametrize("at_s", [0.0, 0.001, 0.003, 0.004, 0.01, 0.02, 0.1])
def test_cancelled_while_others_wait_for_its_room(at_s: float) -> None:
    world = World()
    world.linked(3)
    client, other = world.client(), world.client()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    hogs = [client.submit(range(50 + i), params) for i in range(4)]
    waiting = other.submit((1, 2, 3))
    world.run(for_s=at_s)
    for name in list(client.answers):
        client.cancel(name)
    finish(world, waiting)
    assert {a.code for a in hogs} == {"cancelled"}


# ------------------------------------------------------------------ deadlines


def timed(timeout_s: float, count: int = 60) -> SamplingParams:
    """Return parameters with a deadline."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True, timeout_s=timeout_s)


def ends_in_time(world: World, answer: Answer) -> None:
    """Assert that it ends by its deadline, but for the way of messages, and leaves nothing."""
    assert answer.params.timeout_s is not None
    assert world.run(lambda: answer.end is not None)
    assert answer.code == "deadline_exceeded"
    assert abs(answer.ended_at - answer.sent_at - answer.params.timeout_s) < 0.01
    answer.check()


@pytest.mark.parametrize("timeout_s", [0.0001, 0.004, 0.01, 0.03, 0.1])
def test_deadline_of_a_running_request(timeout_s: float) -> None:
    world = World()
    world.linked(3)
    client = world.client()
    answer, other = client.submit(LONG, timed(timeout_s)), client.submit((1, 2))
    ends_in_time(world, answer)
    finish(world, other)


def test_deadline_of_a_waiting_request() -> None:
    world = World(with_settings(max_batch_sequences=1))
    world.linked(3)
    client = world.client()
    first, late = client.submit((1,), timed(100.0, 100)), client.submit((2,), timed(0.2))
    ends_in_time(world, late)
    assert late.token_ids == []
    finish(world, first)


def test_deadline_while_layers_load() -> None:
    world = World()
    for i in range(3):
        world.worker(f"w{i}").load_s = 5.0
    assert world.run(lambda: world.state == "loading")
    client = world.client()
    answer, patient = client.submit(LONG, timed(1.0)), client.submit((1,), timed(60.0, 5))
    ends_in_time(world, answer)
    finish(world, patient)


def test_deadline_while_the_prompt_is_tokenized() -> None:
    world = World(text_delay_s=2.0)
    world.linked(3)
    client = world.client()
    answer = client.submit(LONG, timed(0.5))
    ends_in_time(world, answer)
    assert world.core.status(now=world.now).answers_waiting == 0
    finish(world)


def test_deadline_while_only_the_text_is_missing() -> None:
    world = World(text_delay_s=0.4)
    world.linked(3)
    answer = world.client().submit((1,), timed(1.0, 2))
    world.run(lambda: world.core.status(now=world.now).tokens_generated == 2)
    ends_in_time(world, answer)
    finish(world)


def test_deadline_that_is_met_changes_nothing() -> None:
    world = World()
    world.linked(3)
    client = world.client()
    answers = [client.submit((i,), timed(5.0, 10)) for i in range(5)]
    finish(world, *answers)
    world.run(for_s=10.0)
    assert world.core.status(now=world.now).requests_failed == 0


def test_deadline_with_a_worker_that_hangs() -> None:
    """Nothing comes from the stages, and yet the client is told in time."""
    world = World()
    _, victim, _ = world.linked(3)
    answer = world.client().submit(LONG, timed(1.0))
    world.run(lambda: len(answer.token_ids) == 2)
    victim.hung = True
    ends_in_time(world, answer)
    victim.resume()
    finish(world)


# ------------------------------------------------------------------ overload, fairness


def test_refusal_comes_at_once_and_says_when_to_come_back() -> None:
    """What it says is near the truth, whatever the pace."""
    waits = []
    for task_s in (0.2, 0.6):
        world = World(with_settings(max_waiting_requests=8, max_batch_sequences=1))
        for worker in world.linked(3, 2000):
            worker.task_s = task_s
        client, late = world.client(), world.client()
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        answers = [client.submit((i,), params) for i in range(8)]
        world.run(lambda a=answers: a[3].end is not None)  # type: ignore[misc]
        answers += [client.submit((i,), params) for i in range(10)]
        world.run(for_s=0.01)
        refused = late.submit((1,), params)
        world.run(lambda a=refused: a.end is not None, for_s=0.1)  # type: ignore[misc]
        assert refused.code == "overloaded"
        assert refused.ended_at - refused.sent_at < 0.1
        assert isinstance(refused.end, RequestFailed)
        wait_s, began = refused.end.retry_after_s, world.now
        assert world.run(world.all_ended)
        finished = [a for a in answers if not a.code]
        assert 0.5 < wait_s / (finished[-1].ended_at - began) < 2.0
        waits.append(wait_s)
        finish(world, *finished)
    assert waits[1] > 2 * waits[0]


def test_many_answers_of_one_request_count_as_many() -> None:
    world = World(with_settings(max_waiting_requests=5))
    client = world.client()
    world.worker("w0", 2000).load_s = 5.0
    world.run(lambda: world.state == "loading")
    three = SamplingParams(max_new_tokens=4, n=3)
    first, second, third = client.submit((1,), three), client.submit((2,), three), client.submit()
    world.run(lambda: second.end is not None, for_s=0.1)
    assert second.code == "overloaded"
    finish(world, first, third)


def test_client_with_one_request_does_not_wait_for_one_with_fifty() -> None:
    world = World(with_settings(max_batch_sequences=4))
    world.linked(3, 2000)
    greedy, modest = world.client(), world.client()
    many = [greedy.submit((i,), SamplingParams(max_new_tokens=20)) for i in range(50)]
    world.run(lambda: many[5].end is not None)
    one = modest.submit((77,), SamplingParams(max_new_tokens=20))
    world.run(lambda: one.end is not None)
    assert sum(a.end is not None for a in many) <= 6 + 4 + 4
    finish(world, *many, one)
    ends = [a.ended_at for a in many]
    assert sum(a > b for a, b in pairwise(ends)) < 25  # first come first served within a client


def test_clients_get_equal_shares() -> None:
    """One asks for long answers, one for short ones: tokens are shared, not requests."""
    world = World(with_settings(max_batch_sequences=4, max_waiting_requests=500))
    world.linked(3, 4000)
    clients = [world.client() for _ in range(2)]
    for i in range(100):
        clients[0].submit((i % 90, i // 90), SamplingParams(max_new_tokens=40, ignore_eos=True))
        clients[1].submit((i % 90, i // 90), SamplingParams(max_new_tokens=10, ignore_eos=True))
    world.run(lambda: all(a.end for a in list(clients[1].answers.values())[:80]))
    got = [sum(len(a.token_ids) for a in c.answers.values()) for c in clients]
    assert 0.75 < got[0] / got[1] < 1.34
    for client in clients:
        client.vanish()
    finish(world)


def test_five_hundred_requests_against_a_queue_of_64() -> None:
    settings = with_settings(max_batch_tokens=64, max_batch_sequences=32, max_waiting_requests=64)
    world = World(settings)
    world.linked(3, 1400)
    clients = [world.client() for _ in range(5)]
    for i in range(500):
        prompt = [(i * j) % 90 for j in range(1 + i % 30)]
        params = SamplingParams(max_new_tokens=1 + i % 40)
        world.at(0.002 * i, lambda i=i, p=prompt, q=params: clients[i % 5].submit(p, q))  # type: ignore[misc]
    world.run(for_s=1.0)
    assert world.run(world.all_ended)
    answers = [a for client in clients for a in client.answers.values()]
    assert len(answers) == 500
    refused = [a for a in answers if a.code]
    assert {a.code for a in refused} == {"overloaded"}
    assert max(a.ended_at - a.sent_at for a in refused) < 0.1
    assert len(refused) < 400
    finish(world, *(a for a in answers if not a.code))
    assert not [line for line in world.logs if "failed a step" in line]


def test_an_answer_with_a_grammar_gets_a_token_for_each_mask() -> None:
    world = World(text_delay_s=0.3)
    world.serving(2)
    bound = world.client().submit((4, 5, 6), SamplingParams(max_new_tokens=40), grammar="5")
    finish(world, bound)
    assert (len(bound.token_ids), bound.finish_reason) == (5, "stop")
    assert min(after - before for before, after in pairwise(bound.token_times)) >= 0.3


def test_an_answer_that_waits_for_a_mask_delays_no_other() -> None:
    world = World(text_delay_s=1.0)
    world.serving(3)
    bound = world.client().submit((4, 5, 6), SamplingParams(max_new_tokens=9), grammar="9")
    world.run(for_s=1.5)  # it has a token, and waits for the next mask
    before = world.core.status(now=world.now).tokens_generated
    world.client().submit((1, 2, 3), SamplingParams(max_new_tokens=40, ignore_eos=True))
    world.run(for_s=2.4)
    assert world.core.status(now=world.now).tokens_generated >= before + 40
    finish(world, bound)
