"""Biases of relative positions, which stages that share a layer may ask for in several threads."""

import torch
from torch import Tensor, nn

from distributed_llm.worker.model.stacks.positions import RelativeBias

FAR = 200
"""Farther than the distances of which biases are made at first."""


def test_another_thread_may_ask_while_biases_of_farther_keys_are_made() -> None:
    table = nn.Embedding(8, 2)
    seen: list[Tensor] = []

    def bucket_of(distances: Tensor) -> Tensor:
        if len(distances) > 2 * FAR:  # as if another thread ran now
            seen.append(bias.between(range(3), range(5)))
        return distances % 8

    bias = RelativeBias(table, bucket_of)
    with torch.inference_mode():
        before = bias.between(range(3), range(5))
        bias.between(range(FAR, FAR + 1), range(FAR + 1))
        assert len(seen) == 1
        assert torch.equal(seen[0], before)
        assert torch.equal(bias.between(range(3), range(5)), before)


def test_biases_of_one_query_are_those_it_has_among_others() -> None:
    bias = RelativeBias(nn.Embedding(8, 2), lambda distances: distances % 8)
    together = bias.between(range(4), range(6))
    for query in range(4):
        alone = bias.between(range(query, query + 1), range(6))
        assert torch.equal(alone[:, 0], together[:, query])
