"""How the weights of a checkpoint are called by transformers, whatever its files call them."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.gguf_types import GGUF_METHOD
from distributed_llm.common.ngrams import table_part
from distributed_llm.common.schemes.reading import check_method
from distributed_llm.worker.model.quantized.gguf_names import GgufNames
from distributed_llm.worker.model.quantized.mlx_names import mlx_target
from distributed_llm.worker.model.quantized.targets import Target


class WeightNames:
    """How the weights of a checkpoint are called by transformers.

    Args:
        checkpoint: with the weights.
        whole: the model, on the meta device.
        path: of its layers.
    """

    def __init__(self, checkpoint: Checkpoint, whole: PreTrainedModel, path: str) -> None:
        self._checkpoint = checkpoint
        self._path = path
        in_gguf = check_method(checkpoint.config) == GGUF_METHOD
        self._gguf = GgufNames(whole, checkpoint) if in_gguf else None

    def targets(self, name: str) -> Sequence[Target | None]:
        """Return what becomes of a weight of GGUF files, or of MLX's experts, else None.

        It is several things if the files have as one what the model has apart.
        """
        return self._gguf.targets(name) if self._gguf else (mlx_target(name),)

    def name(self, name: str, target: Target | None) -> str:
        """Return the name of a weight for transformers' loader, with 0 for its layer's number."""
        layer = self._checkpoint.layer_in(name)
        if layer is None:
            return target.parameter if target else name
        path, known = (
            (self._path, target.parameter) if target else (self._checkpoint.layer_prefix, name)
        )
        whole = f"{path}.0.{known.removeprefix(f'{path}.{layer}.')}"
        part = table_part(whole)
        return whole if part is None else part[0]

    def parameter(self, name: str) -> str:
        """Return the name of a weight outside the layers for transformers' loader."""
        return self.name(name, self.targets(name)[0])
