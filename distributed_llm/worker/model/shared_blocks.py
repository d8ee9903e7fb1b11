"""Blocks that several layers of a stage have in common: loaded once, and called by each.

In the model each layer has modules of its own, with the same weights. Here only one layer's are
loaded, and the others refer to what it consists of.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distributed_llm.common.types import LayerRange

_NAMES = ("shared_transformer", "shared_transf")
"""What layers call their block."""


class SharedBlock(nn.Module):
    """A block as one layer calls it.

    Args:
        block: of transformers; its modules may be others' as well.
        number: of the layer in the model.
    """

    def __init__(self, block: nn.Module, number: int) -> None:
        super().__init__()
        self.block = _copy_of(block)
        attention: Any = _copy_of(block.get_submodule("self_attn"))
        attention.layer_idx = number  # where its keys and values are
        self.block.self_attn = attention
        self._number = number

    def forward(self, hidden_states: Tensor, *, layer_idx: int, **kwargs: Any) -> Tensor:
        """Return what the block makes of hidden states.

        Args:
            hidden_states: [1, tokens, hidden_size].
            layer_idx: as the model counts its layers, which are those of a stage; ignored.
            kwargs: for the block.
        """
        output: Tensor = self.block(hidden_states, layer_idx=self._number, **kwargs)
        return output


def holders_of(
    sources: Sequence[int | None], layers: LayerRange, is_held: Callable[[int], bool]
) -> dict[int, int]:
    """Return which layer of a stage holds a block, by the layer under whose name the files do.

    Args:
        sources: of all layers, as `common.shared_blocks.block_sources` returns them.
        layers: of the stage.
        is_held: tells whether another stage in this process has a layer, with its block.
    """
    found: dict[int, int] = {}
    for layer in sorted(range(layers.start, layers.stop), key=lambda one: (not is_held(one), one)):
        if (source := sources[layer]) is not None:
            found.setdefault(source, layer)
    return found


def leave_out_blocks(
    empty: Mapping[int, nn.Module], sources: Sequence[int | None], holders: Mapping[int, int]
) -> None:
    """Take out of layers what they do not hold, before they are loaded.

    Args:
        empty: the layers by their numbers in the model.
        sources: as for `holders_of`.
        holders: as it returns them.
    """
    for number, layer in empty.items():
        source = sources[number]
        if source is not None and holders[source] != number:
            setattr(layer, _name_of(layer), nn.Module())


def share_blocks(
    layers: Mapping[int, nn.Module], sources: Sequence[int | None], holders: Mapping[int, int]
) -> None:
    """Have the loaded layers of a stage call their blocks.

    Args:
        layers: by their numbers in the model.
        sources: as for `holders_of`.
        holders: as it returns them.
    """
    for source, holder in holders.items():
        held: Any = getattr(layers[holder], _name_of(layers[holder]))
        block = held.block if isinstance(held, SharedBlock) else held
        for number, layer in layers.items():
            name = _name_of(layer) if sources[number] == source else ""
            if name and not isinstance(getattr(layer, name), SharedBlock):
                setattr(layer, name, SharedBlock(block, number))


def block_of(layer: nn.Module) -> nn.Module | None:
    """Return the block of a layer that others may call as well; None if it has none."""
    return next((getattr(layer, name) for name in _NAMES if hasattr(layer, name)), None)


def _name_of(layer: nn.Module) -> str:
    return next(name for name in _NAMES if hasattr(layer, name))


def _copy_of(module: nn.Module) -> Any:
    """Return a module of its own with the same parameters and the same modules inside."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
