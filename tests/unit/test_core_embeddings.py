"""The core in a simulated cluster: embeddings, which are sums over positions that count once."""

import pytest

from distributed_llm.common.messages import Embedded
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.fake_client import Answer
from tests.unit.fake_model import CONTEXT
from tests.unit.simulation import World, with_settings

PROMPT = tuple(range(1, 61))


def all_right(world: World, *answers: Answer) -> None:
    """Run until all have ended, and check them."""
    assert world.run(lambda: all(answer.end is not None for answer in answers), for_s=200.0)
    for answer in answers:
        answer.check()
        assert not answer.embeds or isinstance(answer.end, Embedded), answer.end


@pytest.mark.parametrize("prompt", [(7,), PROMPT[:7], PROMPT, tuple(range(64)) * 4])
def test_prompts_are_embedded_in_chunks_beside_answers(prompt: tuple[int, ...]) -> None:
    world = World(with_settings(max_batch_tokens=6, min_kv_tokens=CONTEXT))
    for number in range(3):
        world.worker(f"w{number}", 2000)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    answers = [client.submit((number, 1, 2), params) for number in range(3)]
    all_right(world, client.embed(prompt), *answers, client.embed((7, 8)))
    world.settle()
    world.check_drained()


def test_whoever_shares_its_prefix_gives_but_takes_none() -> None:
    world = World(with_settings(min_kv_tokens=CONTEXT))
    world.worker("w", 5000)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    for _ in range(2):
        all_right(world, client.embed(PROMPT))
    assert world.core.status(now=world.now).prefix_hit_tokens == 0
    all_right(world, client.submit(PROMPT))
    assert world.core.status(now=world.now).prefix_hit_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("after", [1, 4, 9])
@pytest.mark.parametrize("fault", ["dies", "loses its KV cache", "hangs", "fails"])
def test_what_is_computed_again_counts_once(fault: str, after: int) -> None:
    world = World(with_settings(max_batch_tokens=6))
    workers = world.serving(2)
    world.worker("spare", 2000)
    world.run(for_s=1.0)
    client = world.client()
    embedded = [client.embed(PROMPT), client.embed(PROMPT[::-1])]
    answer = client.submit((1, 2, 3))
    worker, left = workers[-1], [after]

    def break_it(task: object) -> None:
        left[0] -= 1
        if left[0]:
            return
        match fault:
            case "dies":
                worker.kill(silently=False)
            case "hangs":
                worker.hung = True
            case "fails":
                worker.fail_tasks += 1
            case _:
                assert worker.stage is not None
                worker.stage.kv.clear()

    worker.before_task = break_it
    all_right(world, *embedded, answer)
    assert left[0] <= 0


def test_a_prompt_may_fill_the_context_and_not_more() -> None:
    world = World(with_settings(min_kv_tokens=CONTEXT))
    world.worker("w", 5000)
    assert world.run(lambda: world.state == "serving")
    client = world.client()
    all_right(world, client.embed([1] * CONTEXT))
    longer, none, late = (
        client.embed([1] * (CONTEXT + 1)),
        client.embed([]),
        client.embed(PROMPT, 1e-6),
    )
    assert world.run(lambda: all(one.end is not None for one in (longer, none, late)))
    assert [longer.code, none.code, late.code] == [
        "context_length_exceeded",
        "invalid_request",
        "deadline_exceeded",
    ]


def test_it_ends_when_it_is_cancelled() -> None:
    world = World(with_settings(max_batch_tokens=6))
    world.serving(2)
    client = world.client()
    answer = client.embed(PROMPT)
    world.run(for_s=0.01)
    client.cancel("r0")
    assert world.run(lambda: answer.end is not None)
    assert answer.code == "cancelled"
    world.settle()
    world.check_drained()
