"""Shares weights between two stages of the same model in one process.

Both stages reference the same tensors; dropping one stage leaves them to the other. A shared layer
is a shallow copy of the layer's outermost module, so that each stage has its own hooks on it.
Modules outside the layers have no hooks, and are shared as they are.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.kernels import OpaqueWeights
from distributed_llm.worker.model.layer_cuts import LayerCut

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class StageModel:
    """A model reduced to one stage.

    Attributes:
        whole: the complete model on the meta device. Stages that are loaded beside this one are
            made from a copy of it, because building it anew would change torch's default dtype for
            all threads meanwhile.
        model: the ForCausalLM; modules outside the stage are empty.
        decoder: the part of `model` without the head.
        layers: of the stage, the first one at index 0.
        numbers: of these layers in the whole model.
        nbytes: memory of all weights and buffers.
        shared_nbytes: the part of `nbytes` that is shared with the donor.
    """

    whole: PreTrainedModel
    model: PreTrainedModel
    decoder: PreTrainedModel
    layers: nn.ModuleList
    numbers: LayerRange
    nbytes: int
    shared_nbytes: int

    def tensors(self) -> list[object]:
        """Return what holds all weights and buffers."""
        opaque = [m for m in self.model.modules() if isinstance(m, OpaqueWeights)]
        return [*_tensors(self.model), *(held for module in opaque for held in module.tensors())]


class SharedModules:
    """The modules and tensors that a new stage shares with a donor instead of reading them.

    A head that is tied to the embedding is the same matrix. On a stage without embedding the head
    holds it packed (`kernels`), on one with both it does not. So the modules are shared only if
    donor and new stage agree in this; otherwise only the matrix is, if the donor has it unpacked.

    Args:
        checkpoint: of both stages.
        layers: of the new stage.
        tied: names of tied parameters in the whole model, each with that of its original.
        donor: the other stage, or None to share nothing.
        name_of: returns the parameter of the model that a weight of the files becomes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerRange,
        tied: Mapping[str, str],
        donor: StageModel | None,
        name_of: Callable[[str], str] = str,
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = layers
        self._cut = LayerCut(checkpoint.outer.per_layer_width, layers)
        self._donor = donor
        self._tied: tuple[str, ...] = ()
        self._matrices: set[str] = set()
        if checkpoint.outer.ties_embeddings:
            last = LayerRange(checkpoint.num_layers - 1, checkpoint.num_layers)
            weights = (weight.name for weight in checkpoint.weights_of(last))
            held = map(name_of, filter(checkpoint.outer.is_tied, weights))
            self._matrices = {tied.get(name, name) for name in held}
            self._tied = (*tied.keys(), *tied.values())

    def has_layer(self, layer: int) -> bool:
        """Return whether a layer of the model is shared."""
        held = self._donor.numbers if self._donor else None
        return held is not None and held.start <= layer < held.stop

    def layer(self, layer: int) -> nn.Module:
        """Return a shared layer, without hooks."""
        assert self._donor is not None
        layer_copy = copy.copy(self._donor.layers[layer - self._donor.numbers.start])
        for name in _HOOKS:
            setattr(layer_copy, name, OrderedDict())
        return layer_copy

    def has(self, name: str) -> bool:
        """Return whether the module that a tensor belongs to, outside the layers, is shared.

        What belongs to no module but the model itself, or to one that holds the layers, is not.
        """
        owner = name.rpartition(".")[0]
        holds_layers = f"{self._checkpoint.layer_prefix}.".startswith(f"{owner}.")
        if self._donor is None or not owner or holds_layers:
            return False
        held = self._donor.numbers
        if self._cut.applies_to(name):
            return held == self._layers
        of_tied = {one.rpartition(".")[0] for one in (*self._tied, *self._matrices)}
        if owner in of_tied and self._is_last(self._layers):
            embeds = self._checkpoint.outer.embeds
            return self._is_last(held) and embeds(held) == embeds(self._layers)
        return self._uses(held, name)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the shared modules outside the layers, by each of their names."""
        if self._donor is None:
            return
        inside = {id(module) for module in self._donor.layers.modules()}
        for name, module in self._donor.model.named_modules(remove_duplicate=False):
            own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            if isinstance(module, OpaqueWeights):
                own = ["weight"]
            if own and id(module) not in inside:
                tensor = f"{name}.{own[0]}"
                if self.has(tensor) and self._uses(self._layers, tensor):
                    yield name, module

    def matrix(self, name: str) -> Tensor | None:
        """Return the donor's tensor for a tied matrix of the checkpoint, or None."""
        if self._donor is None or name not in self._matrices:
            return None
        for parameter in self._tied:
            try:
                tensor = self._donor.model.get_parameter(parameter)
            except AttributeError:  # the donor lacks it, or has it packed
                continue
            if tensor.dim() > 1:  # the bias of a head may be tied as well, to another bias
                return tensor
        return None

    def _uses(self, layers: LayerRange, name: str) -> bool:
        return self._checkpoint.outer.is_used_by(layers, name)

    def _is_last(self, layers: LayerRange) -> bool:
        return layers.stop == self._checkpoint.num_layers


def shared_nbytes(model: PreTrainedModel, donor: StageModel) -> int:
    """Return the bytes of the weights and buffers that a model shares with the donor."""
    theirs = {id(t) for t in _tensors(donor.model)}
    places = {t.data_ptr() for t in _tensors(donor.model)}  # other tensors may be the same matrix
    opaque = {id(m) for m in donor.model.modules() if isinstance(m, OpaqueWeights)}
    ours = {
        place: t.nbytes
        for t in _tensors(model)
        if (place := t.data_ptr()) in places or id(t) in theirs
    }
    return sum(ours.values()) + sum(
        module.weight_bytes
        for module in model.modules()
        if isinstance(module, OpaqueWeights) and id(module) in opaque
    )


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
