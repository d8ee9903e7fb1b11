"""A stage of an encoder-decoder that is loaded beside another one holds what it would alone."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.stage import Stage
from tests.encoder_decoders import SETTINGS, build
from tests.model.driver import CPU

MOVES = (((0, 1), (0, 2)), ((4, 5), (3, 5)), ((0, 4), (0, 5)), ((0, 5), (3, 5)))
"""Layers of the stage that is there and of the new one; three are the encoder's."""


def load(checkpoint: Checkpoint, layers: tuple[int, int], donor: Stage | None = None) -> Stage:
    return Stage.load(checkpoint, LayerRange(*layers), device=CPU, dtype=torch.float32, donor=donor)


def held(stage: Stage) -> Mapping[str, Tensor]:
    """Return all weights and buffers, by each of their names."""
    model = stage._held.model
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_it_holds_what_it_would_alone(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_layers == 5
    for before, after in MOVES:
        expected = held(load(checkpoint, after))
        actual = held(load(checkpoint, after, load(checkpoint, before)))
        assert actual.keys() == expected.keys(), (before, after)
        for key, tensor in expected.items():
            assert torch.equal(actual[key], tensor), (before, after, key)
