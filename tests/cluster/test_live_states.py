"""Layers with a state of their own move between real workers while answers are written."""

from pathlib import Path

import pytest

from distributed_llm import DistributedClient, LocalCluster
from tests.checkpoints import make_checkpoint
from tests.cluster.test_live_moves import LIMIT_S, WORKER, Answer
from tests.reference import check_greedy
from tests.waiting import eventually
from tests.warm import checked

pytestmark = pytest.mark.timeout(120)

NUM_LAYERS = 6
PROMPTS = [[3 + n, *((7 * i + n) % 90 + 3 for i in range(n))] for n in (69, 12)]
NUM_TOKENS = 60
CHUNK = 32
"""Tokens of a prompt in a step at most."""


def test_answers_go_on_from_states_that_moved(tmp_path: Path) -> None:
    """Nothing is computed again, and others may go on from a snapshot that moved."""
    folder = checked(
        make_checkpoint(tmp_path, "qwen3_next", num_layers=NUM_LAYERS, max_position_embeddings=512)
    )
    settings = {"strategy": "even", "replicas": 1, "max_batch_tokens": CHUNK}
    with (
        LocalCluster(folder, [{**WORKER, "slowdown": 4.0}] * 2, coordinator=settings) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        answers = [Answer(client, prompt, max_new_tokens=NUM_TOKENS) for prompt in PROMPTS]
        eventually(lambda: all(len(each.token_ids) > 3 for each in answers), limit_s=LIMIT_S)
        client.drain_worker(client.status().workers[0].name)
        assert not any(each.has_ended for each in answers), "layers moved too late for this test"
        for each in answers:
            each.end(complete=True)
        status = client.status()
        client.generate(PROMPTS[0], max_new_tokens=1, temperature=0.0)
        shared = client.status().prefix_hit_tokens - status.prefix_hit_tokens
    assert status.moves == 1
    assert shared == len(PROMPTS[0]) - 1
    for prompt, each in zip(PROMPTS, answers, strict=True):
        check_greedy(folder, prompt, each.token_ids)
        assert len(each.token_ids) == NUM_TOKENS
        assert each.generation is not None
        stages = each.generation.timings.stages
        for layer in range(NUM_LAYERS):
            of_layer = [one for one in stages if one.layers.start <= layer < one.layers.stop]
            steps = NUM_TOKENS + len(prompt) // CHUNK
            assert sum(one.tasks for one in of_layer) <= steps + 1
        assert len(stages) == 3, "two before the move, and one after it"
