"""The core in a simulated cluster: KV cache that is shared, runs out, and is computed again."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import Finished, ReleaseSequences
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import KV_BLOCK
from tests.unit.fake_client import Answer
from tests.unit.simulation import World, finish, with_settings

ROOMY = 4000
"""Memory with which three workers have room for more than any test needs."""

PROMPT = tuple((7 * i) % 90 for i in range(100))


def tokens(count: int, **others: int) -> SamplingParams:
    """Return the parameters of an answer of so many tokens."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **others)  # type: ignore[arg-type]


def cached(answer: Answer) -> int:
    """Return how many tokens of its prompt were there already."""
    assert isinstance(answer.end, Finished)
    return answer.end.usage.cached_tokens


def computed(world: World, *answers: Answer) -> int:
    """Run until these are finished; return how many tokens every stage computed."""
    before = [w.stage.num_computed for w in world.plan() if w.stage]
    finish(world, *answers)
    after = [w.stage.num_computed for w in world.plan() if w.stage]
    found = {b - a for a, b in zip(before, after, strict=True)}
    assert len(found) == 1
    return found.pop()


def nothing_failed(world: World) -> bool:
    """Return whether no step was refused or given up."""
    return not [x for x in world.logs if "failed a step" in x or "computed again" in x]


# ------------------------------------------------------------------ prefixes


def test_same_prompt_again_computes_one_token_of_it() -> None:
    world = World()
    world.linked(3, ROOMY)
    client = world.client()
    first = client.submit(PROMPT, tokens(5))
    assert computed(world, first) == len(PROMPT) + 4
    assert cached(first) == 0
    assert world.core.status(now=world.now).kv_tokens_cached >= len(PROMPT)
    second = client.submit(PROMPT, tokens(5))
    assert computed(world, second) == 1 + 4
    assert cached(second) == len(PROMPT) - 1
    assert world.core.status(now=world.now).prefix_hit_tokens == len(PROMPT) - 1
    assert nothing_failed(world)


def test_conversation_goes_on_from_its_last_answer() -> None:
    world = World()
    world.linked(3, ROOMY)
    client = world.client()
    talk = list(PROMPT[:40])
    for turn in range(4):
        answer = client.submit(talk, tokens(20))
        count = computed(world, answer)
        assert cached(answer) == (len(talk) - 11 if turn else 0)  # all but what is new
        assert count == len(talk) - cached(answer) + 19
        talk += [*answer.token_ids, *range(10)]
    assert nothing_failed(world)


def test_prefix_of_a_running_request_is_shared_too() -> None:
    world = World()
    world.linked(3, ROOMY)
    client = world.client()
    first = client.submit(PROMPT, tokens(30))
    world.run(lambda: len(first.token_ids) == 10)
    other = client.submit([*PROMPT, 1, 2], tokens(10))
    assert computed(world, first, other) < len(PROMPT) + 30 + 2 + 10
    assert cached(other) == len(PROMPT)
    assert nothing_failed(world)


def test_requests_that_come_together_compute_a_long_common_prompt_once() -> None:
    world = World()
    world.linked(3, ROOMY)
    client = world.client()
    answers = [client.submit([*PROMPT, i], tokens(3)) for i in range(6)]
    assert computed(world, *answers) <= len(PROMPT) + 6 * 3
    assert nothing_failed(world)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_n_answers_share_their_prompt(temperature: float) -> None:
    world = World()
    world.linked(3, ROOMY)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, n=4, seed=3, temperature=temperature)
    answer = world.client().submit(PROMPT, params)
    assert computed(world, answer) == len(PROMPT) + 3 + 4 * 5
    assert len({tuple(one.token_ids) for one in answer.all}) == 4  # seeds differ
    assert isinstance(answer.end, Finished)
    assert answer.end.usage.completion_tokens == 24
    assert nothing_failed(world)


def test_leader_that_is_cancelled_leaves_its_followers_to_themselves() -> None:
    for tenths in range(0, 60, 3):
        world = World()
        world.linked(3, ROOMY)
        leader, client = world.client(), world.client()
        leader.submit(PROMPT, tokens(5))
        followers = [client.submit([*PROMPT, i], tokens(5)) for i in range(3)]
        world.run(for_s=tenths / 1000)
        leader.cancel("r0")
        finish(world, *followers)
        assert nothing_failed(world)


def test_prefix_is_gone_with_its_plan_and_answers_stay_the_same() -> None:
    world = World()
    victim, *_ = world.linked(3, ROOMY)
    client = world.client()
    first = client.submit(PROMPT, tokens(5))
    finish(world, first)
    victim.kill()
    world.run(for_s=1.0)
    assert world.core.status(now=world.now).kv_tokens_cached == 0
    again = client.submit(PROMPT, tokens(5))
    finish(world, again)
    assert cached(again) == 0
    assert again.token_ids == first.token_ids


def test_worker_lost_while_a_prefix_is_shared() -> None:
    for at_token in range(1, 8):
        world = World()
        _, victim, _ = world.linked(3, ROOMY)
        client = world.client()
        finish(world, client.submit(PROMPT, tokens(5)))
        answers = [client.submit([*PROMPT, i], tokens(10)) for i in range(4)]
        world.run(lambda n=at_token, a=answers[0]: len(a.token_ids) >= n)  # type: ignore[misc]
        victim.kill()
        finish(world, *answers)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_prefix_that_a_stage_lost_is_computed_again(stage: int) -> None:
    world = World()
    forgetful = world.linked(3, ROOMY)[stage]
    client = world.client()
    first = client.submit(PROMPT, tokens(5))
    finish(world, first)
    assert forgetful.stage is not None
    forgetful.stage.kv.clear()
    again = client.submit(PROMPT, tokens(5))
    finish(world, again)
    assert again.token_ids == first.token_ids
    assert world.epoch == 1
    third = client.submit(PROMPT, tokens(5))
    assert computed(world, third) == 5  # it shares with the one that was computed again


def test_prefix_that_was_used_least_lately_goes_first() -> None:
    world = World()
    world.linked(3, 850)  # room for four blocks
    client = world.client()
    finish(world, client.submit(PROMPT[:40], tokens(2)))
    finish(world, client.submit(PROMPT[40:80], tokens(2)))
    used = client.submit(PROMPT[:40], tokens(3))  # the other one is older now
    finish(world, used)
    assert cached(used) == 39
    finish(world, client.submit(PROMPT[::-1], tokens(2)))  # two blocks
    kept = client.submit(PROMPT[:40], tokens(2))
    finish(world, kept)
    assert cached(kept) == 39
    gone = client.submit(PROMPT[40:80], tokens(2))
    finish(world, gone)
    assert cached(gone) == 0
    assert world.counts["down", ReleaseSequences] > 0
    assert nothing_failed(world)


# ------------------------------------------------------------------ room


def steps_of(answer: Answer) -> int:
    """Return how many steps a finished request took part in."""
    assert isinstance(answer.end, Finished)
    return answer.end.timings.stages[0].tasks


def test_answers_that_outgrow_the_room_cost_the_youngest() -> None:
    world = World()
    world.linked(3)  # room for two blocks
    client = world.client()
    old, young = client.submit((1,), tokens(100)), client.submit((2,), tokens(100))
    finish(world, old, young)
    assert world.core.status(now=world.now).preemptions == 1
    assert steps_of(old) == 100
    assert steps_of(young) > 100
    assert old.ended_at < young.ended_at
    assert nothing_failed(world)


def test_youngest_goes_first() -> None:
    world = World()
    world.linked(3, 850)  # room for four blocks
    client = world.client()
    old, middle, young = (client.submit((i,), tokens(100)) for i in range(3))
    finish(world, old, middle, young)
    assert steps_of(old) == steps_of(middle) == 100
    assert steps_of(young) > 100
    assert nothing_failed(world)


def test_oldest_is_never_preempted_whatever_comes() -> None:
    world = World(with_settings(max_batch_tokens=16))
    world.linked(3, 1000)  # room for five blocks
    clients = [world.client() for _ in range(3)]
    oldest = clients[0].submit((1,), tokens(90))
    world.run(lambda: len(oldest.token_ids) == 1)
    answers = [clients[i % 3].submit((i,), tokens(90 + i % 7)) for i in range(12)]
    finish(world, oldest, *answers)
    assert world.core.status(now=world.now).preemptions >= 3
    assert steps_of(oldest) == 90
    assert nothing_failed(world)


def test_request_alone_gets_all_the_room_there_is() -> None:
    """What others left behind as prefixes, and what it shares itself, must not be in its way."""
    world = World()
    world.linked(3)  # room for two blocks
    client = world.client()
    finish(world, client.submit(PROMPT[:60], tokens(5)))
    answer = client.submit([*PROMPT[:30], *range(10)], tokens(2 * KV_BLOCK - 40))
    finish(world, answer)
    assert nothing_failed(world)


def test_memory_is_bounded_and_stays_as_it_is() -> None:
    """A stage asserts that it never needs more than it said it has."""
    world = World(with_settings(max_batch_tokens=64))
    workers = world.linked(3, 1000)
    client = world.client()
    room = world.core.status(now=world.now).kv_tokens
    most = 0.0

    def done() -> bool:
        nonlocal most
        held = [w.stage.memory_tokens for w in workers if w.stage]
        most = max(most, *held)
        return world.all_ended()

    for turn in range(10):
        for i in range(10):
            client.submit(PROMPT[i : i + 20 + turn], tokens(10 + 3 * i))
        assert world.run(done)
    assert room // 2 < most <= room
    finish(world, *client.answers.values())


# ------------------------------------------------------------------ random load, no faults

_ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.002, 0.01, 0.1]),  # after the one before
        st.integers(0, 2),  # client
        st.integers(0, 3),  # which text the prompt is of
        st.integers(1, 110),  # its length
        st.integers(0, 3),  # tokens of its own
        st.integers(1, 100),  # answer
        st.sampled_from([1, 1, 1, 2, 5]),
        st.none() | st.floats(0.0, 0.2),  # cancelled after
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.timeout(300)
@settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
@given(
    arrivals=_ARRIVALS,
    memory=st.sampled_from([600, 850, 1000, 1400]),
    max_tokens=st.sampled_from([8, 20, 64]),
    slow_link=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_under_any_load_all_get_their_tokens_and_no_step_fails(
    arrivals: list[tuple[float, int, int, int, int, int, int, float | None]],
    memory: int,
    max_tokens: int,
    slow_link: bool,
    seed: int,
) -> None:
    delay_s = (0.001, 0.02) if slow_link else (0.0005, 0.001)
    world = World(with_settings(max_batch_tokens=max_tokens), seed=seed, delay_s=delay_s)
    world.linked(3, memory)
    room = min(world.core.status(now=world.now).kv_tokens, 256)
    clients = [world.client() for _ in range(3)]
    for wait_s, at, text, length, own, answer, n, cancel_s in arrivals:
        world.run(for_s=wait_s)
        prompt = [(7 * i + text) % 90 for i in range(length)] + [own] * own
        prompt = prompt[: room - 1]
        params = SamplingParams(max_new_tokens=min(answer, room - len(prompt)), n=n)
        client, name = clients[at], f"r{len(clients[at].answers)}"
        client.submit(prompt, params)
        if cancel_s is not None:
            world.at(cancel_s, lambda c=client, name=name: c.cancel(name))  # type: ignore[misc]
    assert world.run(world.all_ended)
    for client in clients:
        for found in client.answers.values():
            found.check()
            assert found.code == ("cancelled" if found.code else "")
    world.run(for_s=1.0)
    world.check_drained()
    assert nothing_failed(world)
    for worker in world.workers:  # and stages hold just what the book says
        held = world.core._pipelines.all[0].scheduler
        assert held is not None
        assert worker.stage is not None
        assert set(worker.stage.kv) == set(held._ledger.sequence_ids)
