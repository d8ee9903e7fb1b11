"""What a stage shares with another stage of the same model, in the same process.

Both hold the same weights, in the same memory; whichever is dropped first leaves them to the other.
A layer is shared as a copy of its outermost module alone, which has hooks of its own: what one
stage hangs on its layers, the other does not notice. Modules outside the layers have no hooks, and
are the same in both.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.kernels import PackedLinear

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class StageModel:
    """A model cut down to one stage.

    Attributes:
        whole: the model before it was cut, on the meta device; stages loaded beside are cut from
            a copy. To build another one would change, for every thread, torch's default dtype.
        model: the ForCausalLM; modules outside the stage are empty.
        decoder: the part of it that ends before the head.
        layers: the stage's layers, the first of them at index 0.
        numbers: which of the model's layers these are.
        nbytes: memory of all weights and buffers.
        shared_nbytes: how much of that the stage that it was loaded beside holds too.
    """

    whole: PreTrainedModel
    model: PreTrainedModel
    decoder: PreTrainedModel
    layers: nn.ModuleList
    numbers: LayerRange
    nbytes: int
    shared_nbytes: int

    def tensors(self) -> list[Tensor]:
        """Return all weights and buffers."""
        packed = [m.weight for m in self.model.modules() if isinstance(m, PackedLinear)]
        return [*_tensors(self.model), *packed]


class Loan:
    """What a stage of `layers` takes from `donor`, and need not read.

    Where the head is tied to the embedding, both are one matrix, which the head has in an order of
    its own (`kernels.py`) if there is no embedding beside it. So the modules are lent only to a
    stage that needs the same of the two; to another one, only the matrix is.

    Args:
        tied: the names of tied parameters in the whole model.
        donor: None lends nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerRange,
        tied: Mapping[str, str],
        donor: StageModel | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = layers
        self._donor = donor
        self._tied: set[str] = set()
        self._matrices: set[str] = set()
        if checkpoint.ties_embeddings:
            last = LayerRange(checkpoint.num_layers - 1, checkpoint.num_layers)
            names = (tensor.name for tensor in checkpoint.tensors_of(last))
            self._matrices = set(filter(checkpoint.is_embedding, names))
            self._tied = {*tied.keys(), *tied.values()}

    def has_layer(self, layer: int) -> bool:
        """Return whether this layer of the model is lent."""
        held = self._donor.numbers if self._donor else None
        return held is not None and held.start <= layer < held.stop

    def layer(self, layer: int) -> nn.Module:
        """Return a layer that is lent, without hooks."""
        assert self._donor is not None
        lent = copy.copy(self._donor.layers[layer - self._donor.numbers.start])
        for name in _HOOKS:
            setattr(lent, name, OrderedDict())
        return lent

    def has(self, name: str) -> bool:
        """Return whether the module outside the layers is lent to which this tensor belongs."""
        if self._donor is None:
            return False
        held = self._donor.numbers
        if name in self._tied | self._matrices and self._is_last(self._layers):
            return self._is_last(held) and (held.start == 0) == (self._layers.start == 0)
        return self._uses(held, name)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield what is lent outside the layers, by name."""
        if self._donor is None:
            return
        inside = {id(module) for module in self._donor.layers.modules()}
        for name, module in self._donor.model.named_modules():
            own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            if isinstance(module, PackedLinear):
                own = ["weight"]
            if own and id(module) not in inside:
                tensor = f"{name}.{own[0]}"
                if self.has(tensor) and self._uses(self._layers, tensor):
                    yield name, module

    def matrix(self, name: str) -> Tensor | None:
        """Return the tensor of the checkpoint that embedding and head share, if it is lent."""
        if self._donor is None or name not in self._matrices:
            return None
        for parameter in self._tied:
            try:
                return self._donor.model.get_parameter(parameter)
            except AttributeError:  # the donor does not have it, or packed
                continue
        return None

    def _uses(self, layers: LayerRange, name: str) -> bool:
        if self._checkpoint.is_embedding(name):
            return layers.start == 0
        return self._is_last(layers)

    def _is_last(self, layers: LayerRange) -> bool:
        return layers.stop == self._checkpoint.num_layers


def shared_nbytes(model: PreTrainedModel, donor: StageModel) -> int:
    """Return the bytes of weights and buffers that both hold."""
    theirs = {tensor.data_ptr() for tensor in _tensors(donor.model)}
    packed = {id(m) for m in donor.model.modules() if isinstance(m, PackedLinear)}
    ours = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(model)}
    plain = sum(nbytes for place, nbytes in ours.items() if place in theirs)
    return plain + sum(
        module.weight_bytes
        for module in model.modules()
        if isinstance(module, PackedLinear) and id(module) in packed
    )


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
