"""The model that is tuned for, from its files or from a described shape."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.tuning.description import Shape
from distributed_llm.common.architectures import check_architecture
from distributed_llm.common.model_names import resolve_for_coordinator
from distributed_llm.common.tensors import DtypeName
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.coordinator.model_cost import ModelCost


@dataclass(frozen=True)
class TunedModel:
    """What the tuning knows of a model.

    Attributes:
        name: for people.
        dtype: of its files.
        cost: of its layers in a dtype.
    """

    name: str
    dtype: DtypeName
    hidden_size: int
    vocab_size: int
    context_length: int
    cost: Callable[[DtypeName], ModelCost]


def model_of_files(model: str) -> TunedModel:
    """Return the model that `dllm coordinator MODEL` would serve.

    Args:
        model: checkpoint folder or hub id; empty is the built-in model.

    Raises:
        CheckpointError: it cannot be read or split.
    """
    source, checkpoint = resolve_for_coordinator(model)
    check_architecture(checkpoint.config)
    return TunedModel(
        name=source.name or "the built-in model",
        dtype=checkpoint.dtype,
        hidden_size=checkpoint.hidden_size,
        vocab_size=checkpoint.vocab_size,
        context_length=checkpoint.context_length,
        cost=lambda dtype: model_cost(checkpoint, dtype),
    )


def model_of_shape(shape: Shape) -> TunedModel:
    """Return a described model.

    Raises:
        ConfigError: its figures contradict one another.
    """
    size = sum(shape.cost("bfloat16").layer_bytes) / 2
    return TunedModel(
        name=f"a model of {shape.layers} layers with {size / 1e9:.2g} billion parameters",
        dtype=shape.dtype,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        cost=shape.cost,
    )
