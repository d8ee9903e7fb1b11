"""The memory that the layers of a model take. Pure values."""

from dataclasses import dataclass

from distributed_llm.common.offloading import LAYERS_AT_ONCE, layers_on_disk
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize


@dataclass(frozen=True)
class ModelCost:
    """The memory that the parts of a model take, in bytes.

    Attributes:
        layer_bytes: weights of each layer.
        first_bytes: what only the first stage needs (embedding).
        last_bytes: what only the last stage needs (norm, head).
        shared_bytes: a tied embedding, needed by the first and by the last stage.
        kv_bytes_per_token: KV cache of one position in one layer.
        quantize: what floating-point weights become while they are loaded.
        windows: of each layer, how many positions a token sees, itself included; 0: all. Empty: all
            layers see everything.
        workspace_bytes: what a stage takes beside its weights and KV cache while it computes. It is
            taken off the memory of each worker before plans are made (`ServedModel.planned`).
    """

    layer_bytes: tuple[int, ...]
    first_bytes: int
    last_bytes: int
    shared_bytes: int
    kv_bytes_per_token: int
    quantize: Quantize = "none"
    windows: tuple[int, ...] = ()
    workspace_bytes: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_bytes)

    @property
    def all_layer_bytes(self) -> int:
        """Bytes of all layers, without embedding, norm and head."""
        return sum(self.layer_bytes)

    @property
    def all_weight_bytes(self) -> int:
        """Bytes of all weights, each once."""
        return self.weight_bytes(LayerRange(0, self.num_layers))

    def weight_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of weights that a stage of these layers holds."""
        first, last = layers.start == 0, layers.stop == self.num_layers
        return (
            sum(self.layer_bytes[layers.start : layers.stop])
            + self.first_bytes * first
            + self.last_bytes * last
            + self.shared_bytes * (first or last)
        )

    def bytes_from_disk(self, layers: LayerRange, count: int) -> int:
        """Return the bytes that a stage reads in every step if `count` layers stay on the disk."""
        return sum(self._sizes_on_disk(layers, count))

    def bytes_in_memory(self, layers: LayerRange, count: int) -> int:
        """Return the bytes of weights that stay in memory if `count` layers stay on the disk."""
        saved = sorted(self._sizes_on_disk(layers, count))[:-LAYERS_AT_ONCE]
        return self.weight_bytes(layers) - sum(saved)

    def _sizes_on_disk(self, layers: LayerRange, count: int) -> list[int]:
        return [self.layer_bytes[layer] for layer in layers_on_disk(layers, count)]

    def stage_bytes(self, layers: LayerRange, kv_tokens: int) -> int:
        """Return the bytes of a stage with `kv_tokens` positions of KV cache."""
        return self.weight_bytes(layers) + self.kv_bytes_per_token * kv_tokens * len(layers)
