"""Experts that get sorted rows compute those that are not zeros, and give what all would give."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from distributed_llm.worker.model.experts import pack_experts
from distributed_llm.worker.model.sorted_experts import SortedExperts, tell_of_sorted_experts

EXPERTS, TOKENS, WIDTH = 3, 5, 16


@pytest.fixture
def plain() -> Any:
    config = Llama4TextConfig(hidden_size=WIDTH, intermediate_size=24, num_local_experts=EXPERTS)
    experts = Llama4TextExperts(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.fixture
def packed(plain: Any) -> Any:
    model = nn.ModuleDict({"experts": copy.deepcopy(plain)})
    tell_of_sorted_experts(model)
    pack_experts(model)
    return model["experts"]


def rows(*chosen: tuple[int, int]) -> Tensor:
    """Return rows for all experts, with numbers for these pairs of expert and token only."""
    states = torch.zeros(EXPERTS, TOKENS, WIDTH)
    for number, (expert, token) in enumerate(chosen):
        states[expert, token] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
    return states.view(-1, WIDTH)


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        [(2, 4)],
        [(0, 0), (0, 3), (2, 0)],
        [(e, t) for e in range(EXPERTS) for t in range(TOKENS)],
    ],
)
def test_the_result_is_that_of_all_rows(
    plain: Any, packed: Any, chosen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(packed, SortedExperts)
    computed = []
    original = SortedExperts.computed

    def counting(self: SortedExperts, groups: Any, states: Tensor) -> Tensor:
        computed.append(len(set(groups.rows)))
        return original(self, groups, states)

    monkeypatch.setattr(SortedExperts, "computed", counting)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows(*chosen)), plain(rows(*chosen)))
    assert sum(computed) == len(chosen)
