"""Cuts matrices outside the layers, which have a part for each layer, to those of a stage."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distributed_llm.common.per_layer_inputs import lies_along
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.incoming import Floats


@dataclass(frozen=True)
class LayerCut:
    """What a stage has of such matrices; see `common.per_layer_inputs`.

    Attributes:
        width: rows or columns for each layer; 0: there are no such matrices.
        layers: of the stage.
    """

    width: int
    layers: LayerRange

    def applies_to(self, name: str) -> bool:
        """Return whether a parameter is such a matrix."""
        return bool(self.width) and lies_along(name) is not None

    def of(self, name: str, matrix: Tensor) -> Tensor:
        """Return the stage's part of a matrix, in memory of its own if it is not the whole."""
        dim = lies_along(name)
        assert dim is not None
        start, count = self.layers.start * self.width, len(self.layers) * self.width
        return matrix.narrow(dim, start, count).contiguous()

    def shrink_modules(self, model: nn.Module) -> None:
        """Give the modules of a model, on the meta device, the sizes of the stage."""
        for name, module in model.named_modules():
            if not self.applies_to(name) or not isinstance(module, nn.Embedding | nn.Linear):
                continue
            module.weight = nn.Parameter(self.of(name, module.weight), requires_grad=False)
            if isinstance(module, nn.Embedding):
                module.embedding_dim = module.weight.shape[1]
            else:
                module.out_features = module.weight.shape[0]


class CutFloats:
    """The stage's part of such a matrix, as `Floats`.

    Args:
        floats: the whole.
        name: of the parameter.
        cut: what the stage has.
    """

    def __init__(self, floats: Floats, name: str, cut: LayerCut) -> None:
        self._floats = floats
        self._name = name
        self._cut = cut

    def __getitem__(self, index: Any) -> Tensor:
        return self._cut.of(self._name, self._floats[...])[index]
