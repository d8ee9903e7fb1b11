"""Tests of what a worker asks the coordinator about the weights that it fetches."""

from pathlib import Path

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.types import LayerRange
from distributed_llm.weights.inquiry import Inquiry

BUILTIN = Path(__file__).parents[2] / "distributed_llm" / "builtin_model"


def test_weights_are_asked_for_in_the_order_in_which_they_are_loaded() -> None:
    """A layer can be loaded as soon as it is here; what is outside the layers is loaded last."""
    checkpoint = open_checkpoint(BUILTIN)
    layers = LayerRange(0, checkpoint.num_layers)
    inquiry = Inquiry(ModelSource(kind="builtin", name=""), layers, 0.0)
    inquiry.begin(checkpoint)
    asked = [checkpoint.layer_of(tensor.name) for tensor in inquiry.unknown]
    numbers = [layer for layer in asked if layer is not None]
    assert numbers == sorted(numbers)
    assert asked[: len(numbers)] == numbers
    assert len(numbers) < len(asked)
