"""Mixers that are not known to go on from a state are refused, whatever they are called."""

import pytest
from torch import Tensor, nn

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.worker.model.state_layers import wrap_mixers


class Forgetful(nn.Module):
    """Computes each chunk as if nothing preceded it."""

    def forward(self, hidden_states: Tensor, cache_params: object = None) -> Tensor:
        """Return the sum so far, and give the last one to the cache."""
        total = hidden_states.cumsum(dim=1)
        cache_params.update_recurrent_state(total[:, -1], 0)  # type: ignore[attr-defined]
        return total


def test_a_mixer_that_forgets_its_state_in_a_chunk_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Forgetful begins anew"):
        wrap_mixers(nn.ModuleList([nn.Linear(1, 1), Forgetful()]))


def test_other_layers_are_left_alone() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])
    wrap_mixers(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU]
