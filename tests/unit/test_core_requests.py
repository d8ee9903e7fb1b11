"""The core in a simulated cluster: requests, how they end, and who is next."""

from collections.abc import Callable

import pytest

from distributed_llm.common.messages import (
    Cancel,
    Generate,
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
        most = max(most, world.core.status(now=world.now).requests_running)
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
    assert world.core.status(now=world.now).requests_failed == (not silently)


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
