"""A split model answers as the whole one does: text, ids, lists, streams, conversations."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from distributed_llm import (
    AsyncDistributedClient,
    ContextLengthExceeded,
    CoordinatorLost,
    CoordinatorUnreachable,
    DistributedClient,
    Generation,
    InvalidRequest,
    LocalCluster,
)
from tests.cluster.conftest import NUM_LAYERS
from tests.reference import check_varied, reference_ids, reference_text, tokenizer
from tests.waiting import eventually

PROMPT = [5, 17, 42, 99, 7]
OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def test_token_ids_are_those_of_transformers(client: DistributedClient, checkpoint: Path) -> None:
    expected = reference_ids(checkpoint, PROMPT, 40)
    check_varied(expected)
    answer = client.generate(PROMPT, max_new_tokens=40, details=True, **OPEN_END)
    assert answer.token_ids == expected
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 40)


def test_text_is_that_of_transformers(client: DistributedClient, checkpoint: Path) -> None:
    text = client.generate("The quick brown", max_new_tokens=30, **OPEN_END)
    assert text == reference_text(checkpoint, "The quick brown", 30)


def test_every_stage_took_part(client: DistributedClient) -> None:
    answer = client.generate(PROMPT, max_new_tokens=10, details=True, **OPEN_END)
    layers = [stage.layers for stage in answer.timings.stages]
    assert [layer for held in layers for layer in range(held.start, held.stop)] == [
        *range(NUM_LAYERS)
    ]
    assert [stage.tasks for stage in answer.timings.stages] == [10, 10, 10]
    assert all(stage.compute_s > 0 for stage in answer.timings.stages)


def test_a_trace_follows_each_token_through_the_stages(client: DistributedClient) -> None:
    before = client.status()
    chunks = list(client.stream(PROMPT, max_new_tokens=10, trace=True, **OPEN_END))
    steps = [step for chunk in chunks for step in chunk.trace]
    made = [step for step in steps if step.sampled]
    assert [step.index for step in made] == list(range(10))
    assert all(chunk.trace[-1].sampled for chunk in chunks if chunk.token_ids)
    last = made[-1]
    assert (last.start, last.tokens) == (len(PROMPT) + 8, 1)
    assert last.took_s >= sum(hop.compute_s for hop in last.hops) > 0
    after = client.status()
    assert [pipeline.epoch for pipeline in after.pipelines] == [last.epoch]
    (pipeline,) = after.pipelines
    assert [hop.worker for hop in last.hops] == [stage.worker for stage in pipeline.stages]
    assert [hop.layers for hop in last.hops] == [stage.layers for stage in pipeline.stages]
    assert all(stage.step_s for stage in pipeline.stages)
    sent_bytes = pipeline.links[0].bytes_sent - before.pipelines[0].links[0].bytes_sent
    assert sent_bytes == last.hops[1].bytes_in * sum(step.tokens for step in steps)
    assert after.counters.steps - before.counters.steps == len(steps)


def test_a_list_of_prompts_gives_a_list_in_order(
    client: DistributedClient, checkpoint: Path
) -> None:
    prompts = [[3 + i, 50 - i, 7][: 1 + i % 3] for i in range(12)]
    answers = client.generate(prompts, max_new_tokens=12, details=True, **OPEN_END)
    assert [a.token_ids for a in answers] == [reference_ids(checkpoint, p, 12) for p in prompts]


def test_many_clients_at_once_do_not_disturb_each_other(
    cluster: LocalCluster, checkpoint: Path
) -> None:
    prompts = [[10 + i] * (1 + 7 * i % 40) for i in range(16)]

    def ask(prompt: list[int]) -> list[int]:
        with DistributedClient(cluster.address) as client:
            answer: Generation = client.generate(
                prompt, max_new_tokens=15, details=True, **OPEN_END
            )
            return answer.token_ids

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [reference_ids(checkpoint, prompt, 15) for prompt in prompts]


def test_a_prompt_longer_than_a_step(client: DistributedClient, checkpoint: Path) -> None:
    prompt = [(11 * i) % 250 + 3 for i in range(200)]
    answer = client.generate(prompt, max_new_tokens=20, details=True, **OPEN_END)
    assert answer.token_ids == reference_ids(checkpoint, prompt, 20)


def test_a_stream_joins_to_the_whole_answer(client: DistributedClient) -> None:
    whole = client.generate("Zwölf Boxkämpfer", max_new_tokens=60, details=True, **OPEN_END)
    chunks = list(client.stream("Zwölf Boxkämpfer", max_new_tokens=60, **OPEN_END))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.token_ids == whole.token_ids


def test_the_end_token_ends_an_answer(client: DistributedClient, checkpoint: Path) -> None:
    free = reference_ids(checkpoint, PROMPT, 40)
    end = free[20]
    first = free.index(end)
    answer = client.generate(
        PROMPT, max_new_tokens=40, temperature=0.0, eos_token_id=end, details=True
    )
    assert answer.token_ids == free[: first + 1]
    assert answer.finish_reason == "stop"
    longer = client.generate(
        PROMPT,
        max_new_tokens=40,
        temperature=0.0,
        eos_token_id=end,
        min_new_tokens=first + 5,
        details=True,
    )
    assert longer.token_ids[: first + 4].count(end) == 0
    assert longer.token_ids == reference_ids(
        checkpoint, PROMPT, 40, eos_token_id=end, min_new_tokens=first + 5
    )


def test_a_stop_string_never_shows(client: DistributedClient) -> None:
    text = client.generate("The worker", max_new_tokens=60, **OPEN_END)
    stop = text[20:23]
    expected = text[: text.index(stop)]
    answer = client.generate(
        "The worker", max_new_tokens=60, stop_strings=[stop], details=True, **OPEN_END
    )
    assert answer.text == expected
    assert (answer.finish_reason, answer.stop_string) == ("stop", stop)
    assert answer.usage.completion_tokens == len(answer.token_ids) < 60


def test_a_seed_gives_the_same_text_again_and_others_differ(client: DistributedClient) -> None:
    texts = [
        client.generate(PROMPT, max_new_tokens=30, temperature=1.0, seed=seed, ignore_eos=True)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_seed_gives_the_same_text_however_the_model_is_split(
    client: DistributedClient, checkpoint: Path
) -> None:
    ask: dict[str, Any] = {
        "max_new_tokens": 30,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 7,
        "ignore_eos": True,
    }
    with LocalCluster(checkpoint, workers=1) as whole, DistributedClient(whole.address) as other:
        assert other.generate(PROMPT, **ask) == client.generate(PROMPT, **ask)


def test_a_conversation_goes_through_the_chat_template(
    client: DistributedClient, checkpoint: Path
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer(checkpoint).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    answer = client.chat(messages, max_new_tokens=10, details=True, **OPEN_END)
    assert answer.token_ids == reference_ids(checkpoint, list(ids), 10)
    assert answer.usage.prompt_tokens == len(ids)


def test_repetition_penalty_is_that_of_transformers(
    client: DistributedClient, checkpoint: Path
) -> None:
    answer = client.generate(
        PROMPT, max_new_tokens=30, repetition_penalty=1.7, details=True, **OPEN_END
    )
    expected = reference_ids(checkpoint, PROMPT, 30, repetition_penalty=1.7)
    assert answer.token_ids == expected != reference_ids(checkpoint, PROMPT, 30)


def test_closing_a_stream_frees_its_memory_everywhere(slow_cluster: LocalCluster) -> None:
    with DistributedClient(slow_cluster.address) as client:
        stream = client.stream(PROMPT, max_new_tokens=200, **OPEN_END)
        next(stream)
        eventually(lambda: all(worker.kv_bytes > 0 for worker in client.status().workers))
        stream.close()  # type: ignore[attr-defined]
        eventually(lambda: client.status().answers_running == 0, limit_s=5)
        eventually(lambda: all(worker.kv_bytes == 0 for worker in client.status().workers))


def test_a_client_that_vanishes_takes_its_requests_along(slow_cluster: LocalCluster) -> None:
    with DistributedClient(slow_cluster.address) as client:
        other = DistributedClient(slow_cluster.address)
        stream = other.stream(PROMPT, max_new_tokens=200, **OPEN_END)
        next(stream)
        assert client.status().answers_running == 1
        other.close()
        with pytest.raises(CoordinatorLost, match="closed"):
            next(stream)
        eventually(lambda: client.status().answers_running == 0, limit_s=5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": PROMPT, "temperature": -1.0}, "temperature"),
        ({"prompt": PROMPT, "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": PROMPT, "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": PROMPT, "tempratur": 1.0}, "tempratur"),
        ({"prompt": PROMPT, "seed": 2**64}, "seed"),
        ({"prompt": PROMPT, "stop_strings": [""]}, "stop_strings"),
        ({"prompt": PROMPT, "min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [-1]}, "Token ids"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "\ud800"}, "Unicode"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(
    client: DistributedClient, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        client.generate(**arguments)  # type: ignore[call-overload]
    assert client.generate(PROMPT, max_new_tokens=2, details=True).usage.completion_tokens <= 2


def test_one_bad_prompt_of_a_list_fails_the_list(client: DistributedClient) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary"):
        client.generate([PROMPT, [10**6]], max_new_tokens=5)
    eventually(lambda: client.status().answers_running == 0)


def test_what_exceeds_the_context_is_refused_with_both_numbers(client: DistributedClient) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"250 tokens.*may have 50.*256"):
        client.generate([9] * 250, max_new_tokens=50)


def test_status_tells_who_serves_what(cluster: LocalCluster, client: DistributedClient) -> None:
    status = client.status()
    assert status.state == "serving"
    assert status.num_layers == NUM_LAYERS
    assert {worker.name for worker in status.workers} == {"worker-1", "worker-2", "worker-3"}
    held = sorted(worker.layers for worker in status.workers if worker.layers)
    assert held[0].start == 0
    assert held[-1].stop == NUM_LAYERS
    assert all(a.stop == b.start for a, b in pairwise(held))
    assert all(worker.memory_used_bytes > 0 for worker in status.workers)


def test_the_async_client_does_the_same(cluster: LocalCluster, checkpoint: Path) -> None:
    async def ask() -> tuple[list[int], list[str]]:
        async with AsyncDistributedClient(cluster.address) as client:
            ids = [
                token
                async for chunk in client.stream(PROMPT, max_new_tokens=8, **OPEN_END)
                for token in chunk.token_ids
            ]
            texts = await client.generate(["a", "b"], max_new_tokens=4, **OPEN_END)
            assert (await client.status()).state == "serving"
            return ids, texts

    ids, texts = asyncio.run(ask())
    assert ids == reference_ids(checkpoint, PROMPT, 8)
    assert texts == [reference_text(checkpoint, "a", 4), reference_text(checkpoint, "b", 4)]


def test_no_coordinator_is_said_at_once(unused_port: int) -> None:
    with (
        DistributedClient(f"127.0.0.1:{unused_port}", connect_timeout_s=0.5) as client,
        pytest.raises(CoordinatorUnreachable, match="nothing listens there"),
    ):
        client.generate("Hi")


def test_an_address_that_is_none() -> None:
    with pytest.raises(InvalidRequest, match="no address"):
        DistributedClient("localhost")


# ------------------------------------------------------------------ what else may be asked


def test_a_client_is_told_what_is_served(client: DistributedClient, checkpoint: Path) -> None:
    model, known = client.model(), tokenizer(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (model.model_type, model.architecture) == ("llama", "LlamaForCausalLM")
    assert (model.num_layers, model.hidden_size, model.vocab_size, model.context_length) == (
        *(NUM_LAYERS, config.hidden_size, config.vocab_size, config.max_position_embeddings),
    )
    assert model.num_parameters == sum(one.numel() for one in whole.parameters())
    assert (model.dtype, model.weight_bytes) == ("float32", 4 * model.num_parameters)
    assert model.has_tokenizer
    assert model.special_tokens == known.special_tokens_map
    assert model.chat_template == known.chat_template


def test_text_and_token_ids_are_those_of_the_tokenizer(
    client: DistributedClient, checkpoint: Path
) -> None:
    known, text = tokenizer(checkpoint), "The worker serves\n"
    ids = known(text)["input_ids"]
    assert client.tokenize(text).token_ids == ids
    bare = client.tokenize(text, add_special_tokens=False).token_ids
    assert bare == known(text, add_special_tokens=False)["input_ids"]
    assert client.detokenize(ids) == known.decode(ids)
    assert client.detokenize([*ids, 1], skip_special_tokens=True) == text
    assert client.tokenize("", add_special_tokens=False).token_ids == []
    assert client.detokenize([]) == ""
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.tokenize_chat(messages).token_ids
    rendered = known.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == known(rendered, add_special_tokens=False)["input_ids"]
    with pytest.raises(InvalidRequest, match="knows no tools"):
        client.tokenize_chat(messages, tools=[{"function": {"name": "f"}}])
    with pytest.raises(InvalidRequest, match="whole numbers"):
        client.detokenize([-1])


def test_embeddings_are_means_of_last_hidden_states(
    client: DistributedClient, checkpoint: Path
) -> None:
    whole = AutoModel.from_pretrained(checkpoint)
    texts = ["The worker", "serves", "The worker serves " * 15]
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer(checkpoint)(text)["input_ids"]])
        with torch.inference_mode():
            expected.append(whole(ids).last_hidden_state[0].mean(dim=0).numpy())
    embeddings = client.embed(texts)
    for embedding, mean in zip(embeddings, expected, strict=True):
        np.testing.assert_allclose(embedding.vector, mean, rtol=1e-4, atol=1e-5)
    one = client.embed(PROMPT)
    assert one.vector.dtype == np.float32
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (len(PROMPT), 0)
    with pytest.raises(InvalidRequest, match="not in the model's vocabulary"):
        client.embed([1 << 30])
