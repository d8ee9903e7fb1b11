"""What requests share, and what they may ask for, on real processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm import (
    DeadlineExceeded,
    DistributedClient,
    InvalidRequest,
    LocalCluster,
)
from tests import reference
from tests.reference import check_greedy, reference_ids
from tests.waiting import eventually

OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def prompt(length: int, first: int) -> list[int]:
    """Return a prompt that no other test sends."""
    return [first, *((7 * i + first) % 90 + 3 for i in range(length - 1))]


def test_workers_hand_on_directly(client: DistributedClient) -> None:
    client.generate(prompt(5, 11), max_new_tokens=2)
    links = sorted(worker.link for worker in client.status().workers)
    assert links == ["", "direct", "direct"]


def test_a_prefix_is_computed_once_and_changes_no_token(
    client: DistributedClient, checkpoint: Path
) -> None:
    begin = prompt(100, 12)
    hits = client.status().prefix_hit_tokens
    first = client.generate([*begin, 4, 5], max_new_tokens=12, details=True, **OPEN_END)
    second = client.generate([*begin, 8, 9, 10], max_new_tokens=12, details=True, **OPEN_END)
    turn = [*begin, 4, 5, *first.token_ids, 60, 61]
    third = client.generate(turn, max_new_tokens=12, details=True, **OPEN_END)
    assert first.token_ids == reference_ids(checkpoint, [*begin, 4, 5], 12)
    assert second.token_ids == reference_ids(checkpoint, [*begin, 8, 9, 10], 12)
    assert third.token_ids == reference_ids(checkpoint, turn, 12)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 100
    assert third.usage.cached_tokens == 113  # all but the last token has its KV cache
    assert client.status().prefix_hit_tokens == hits + 213


def test_answers_to_one_prompt_share_it_and_are_those_of_their_seeds(
    client: DistributedClient,
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "ignore_eos": True}
    begin = prompt(80, 13)
    hits = client.status().prefix_hit_tokens
    answers = client.generate(begin, n=4, seed=21, details=True, **asked)
    assert client.status().prefix_hit_tokens == hits + 3 * 79
    alone = [
        client.generate(begin, seed=21 + choice, details=True, **asked).token_ids
        for choice in range(4)
    ]
    assert [answer.token_ids for answer in answers] == alone
    assert len({tuple(ids) for ids in alone}) > 1
    assert [answer.choice for answer in answers] == [0, 1, 2, 3]


def test_logprobs_are_those_of_the_whole_model(client: DistributedClient, checkpoint: Path) -> None:
    begin = prompt(9, 14)
    answer = client.generate(begin, max_new_tokens=5, logprobs=3, details=True, **OPEN_END)
    assert answer.logprobs is not None
    with torch.inference_mode():
        logits = reference._model(checkpoint)(torch.tensor([begin + answer.token_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(begin) - 1 : -1]
    words = reference.tokenizer(checkpoint)
    for row, token, reported in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert reported.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [one.token_id for one in reported.top] == best.indices.tolist()
        assert reported.text == words.decode([token])
        assert [one.text for one in reported.top] == [words.decode([i]) for i in best.indices]
        values = [one.logprob for one in reported.top]
        assert values == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_bias_decides(client: DistributedClient, checkpoint: Path) -> None:
    begin = prompt(9, 15)
    answer = client.generate(
        begin, max_new_tokens=6, logit_bias={33: 1000.0}, details=True, **OPEN_END
    )
    assert answer.token_ids == [33] * 6
    with pytest.raises(InvalidRequest, match="not in the model's vocabulary"):
        client.generate(begin, logit_bias={10**6: 1.0})
    expected = reference_ids(checkpoint, begin, 6)
    assert client.generate(begin, max_new_tokens=6, details=True, **OPEN_END).token_ids == expected


@pytest.fixture
def roomy(slow_cluster: LocalCluster) -> Iterator[DistributedClient]:
    with DistributedClient(slow_cluster.address) as client:
        yield client


def test_a_request_that_takes_too_long_ends_and_frees_its_memory(roomy: DistributedClient) -> None:
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        roomy.generate(prompt(20, 16), max_new_tokens=200, timeout_s=0.3, **OPEN_END)
    eventually(lambda: roomy.status().kv_tokens_used == 0)
    assert roomy.status().answers_running == 0


def test_small_memory_is_shared_by_giving_way(checkpoint: Path) -> None:
    """Answers outgrow the room: some give way and come back, and no token changes."""
    prompts = [prompt(20, 20 + i) for i in range(24)]
    with (
        LocalCluster(
            checkpoint,
            workers=[{"max_memory": "10MiB"}] * 2,  # 9 of them for what a step takes
            coordinator={"strategy": "memory", "min_kv_tokens": 64},
        ) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        assert client.status().kv_tokens < 24 * 128
        answers = client.generate(prompts, max_new_tokens=100, details=True, **OPEN_END)
        for asked, answer in zip(prompts, answers, strict=True):
            assert len(answer.token_ids) == 100
            check_greedy(checkpoint, asked, answer.token_ids)
        assert client.status().preemptions > 0
        assert client.status().kv_tokens_used == 0
