"""What becomes of a tensor of a file that belongs elsewhere in a model than its name tells.

A file may hold a parameter in pieces, in another order of rows, or with other numbers than a model
of transformers. Where each tensor belongs is said for GGUF (`gguf_names`) and MLX (`mlx_names`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Join = Literal["rows", "turns", "stacks"]
"""How pieces make a parameter: one follows the other along the rows; their rows take turns; or they
are stacks of matrices, and the matrices at the same place in each follow each other."""

_BIAS = "bias"


@dataclass(frozen=True)
class Target:
    """What becomes of a tensor of a file.

    Attributes:
        parameter: of the model that it belongs to, with the layer's number in the whole model.
        piece: which piece of the parameter it is; a matrix has its rows along the last dimension
            but one.
        join: how the pieces make the parameter.
        stack: the rows, in order, are those of so many matrices; 0: of the piece as it is.
        rows: int64: row i of the piece is row `rows[i]` of the tensor; None: they are in order.
        convert: returns the numbers of the piece for those of the tensor, float32; None: they are
            the same, but for the order of rows, and integers may stay integers.
    """

    parameter: str
    piece: int = 0
    join: Join = "rows"
    stack: int = 0
    rows: Tensor | None = None
    convert: Callable[[Tensor], Tensor] | None = None

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return rows, of whatever they consist, in the order of the model."""
        if self.rows is not None:
            tensor = tensor.index_select(max(tensor.dim() - 2, 0), self.rows.to(tensor.device))
        if not self.stack:
            return tensor
        return tensor.reshape(*tensor.shape[:-2], self.stack, -1, tensor.shape[-1])

    def values(self, tensor: Tensor) -> Tensor:
        """Return the numbers of the piece for those of the tensor, float32."""
        return self.convert(tensor) if self.convert else self.ordered(tensor)

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the parameter that pieces make, of whatever their rows consist.

        Args:
            pieces: in order; this is the target of one of them.
        """
        if len(pieces) == 1:
            return pieces[0]
        along = -1 if self.parameter.endswith(_BIAS) else max(-2, -pieces[0].dim())
        match self.join:
            case "rows":
                return torch.cat(list(pieces), dim=along)
            case "turns":
                return torch.stack(list(pieces), dim=along).flatten(along - 1, along)
            case "stacks":
                return torch.cat(list(pieces), dim=along).flatten(along - 1, along)
