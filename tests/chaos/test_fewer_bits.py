"""Machines go and come back under `quantize: auto`: answers go on with the bits that fit."""

from pathlib import Path
from typing import Any

import pytest

from distributed_llm import DistributedClient, LocalCluster
from tests.checkpoints import make_checkpoint
from tests.reference import check_varied, reference_ids
from tests.waiting import eventually
from tests.warm import checked

PROMPT = [5, 17, 42, 99, 7]
NUM_TOKENS = 60
OPEN_END: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
WORKER: dict[str, Any] = {"slowdown": 2.0, "threads": 1, "max_memory": "41MiB"}
"""A step takes 21 MiB. Three hold the weights of 46 MiB, two of them only those of 8 bits."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checked(
        make_checkpoint(
            tmp_path_factory.mktemp("checkpoint"),
            num_layers=8,
            tokenizer=True,
            tie=False,
            seed=10,
            hidden_size=384,
            intermediate_size=1024,
        )
    )


def form_of(client: DistributedClient) -> str:
    """Return what the weights of the pipeline that serves became."""
    return ", ".join(pipeline.quantize for pipeline in client.status().pipelines)


def answered(client: DistributedClient, prompt: list[int], num_tokens: int) -> list[int]:
    chunks = client.stream(prompt, max_new_tokens=num_tokens, **OPEN_END)
    return [token for chunk in chunks for token in chunk.token_ids]


def test_answers_go_on_with_fewer_bits_after_a_loss_and_a_drain(checkpoint: Path) -> None:
    expected = reference_ids(checkpoint, PROMPT, NUM_TOKENS)
    check_varied(expected)
    settings: dict[str, Any] = {"strategy": "memory", "quantize": "auto", "min_kv_tokens": 128}
    with (
        LocalCluster(checkpoint, [WORKER] * 3, coordinator=settings) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        for how in ("loss", "drain"):
            assert form_of(client) == "none"
            got: list[int] = []
            gone = cluster.workers[-1]
            for chunk in client.stream(PROMPT, max_new_tokens=NUM_TOKENS, **OPEN_END):
                if len(got) == 10:
                    gone.kill() if how == "loss" else client.drain_worker(gone.name)
                got += chunk.token_ids
            assert len(got) == NUM_TOKENS
            assert form_of(client) == "int8"
            same = next(at for at in range(NUM_TOKENS) if got[at : at + 1] != expected[at : at + 1])
            assert same >= 10, "what was answered stays"
            rest = answered(client, [*PROMPT, *got[:same]], NUM_TOKENS - same)
            assert [*got[:same], *rest] == got, "as if asked anew"
            assert "requests that run keep their tokens so far" in str(client.status().events)
            if how == "loss":
                cluster.add_worker(**WORKER, name="late")
                eventually(lambda: form_of(client) == "none", limit_s=60.0)
        assert client.status().requests_failed == 0
