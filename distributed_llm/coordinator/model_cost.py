"""What the layers of a model cost in memory. Pure."""

from dataclasses import dataclass

from distributed_llm.common.types import LayerRange


@dataclass(frozen=True)
class ModelCost:
    """What the layers of a model cost.

    Attributes:
        layer_bytes: weights of each layer, bytes.
        first_bytes: what only the first stage needs (embedding), bytes.
        last_bytes: what only the last stage needs (norm, head), bytes.
        shared_bytes: a tied embedding, needed by the first and by the last stage, bytes.
        kv_bytes_per_token: KV cache of one position in one layer, bytes.
    """

    layer_bytes: tuple[int, ...]
    first_bytes: int
    last_bytes: int
    shared_bytes: int
    kv_bytes_per_token: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_bytes)

    def weight_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of weights that a stage of these layers holds."""
        first, last = layers.start == 0, layers.stop == self.num_layers
        return (
            sum(self.layer_bytes[layers.start : layers.stop])
            + self.first_bytes * first
            + self.last_bytes * last
            + self.shared_bytes * (first or last)
        )

    def stage_bytes(self, layers: LayerRange, kv_tokens: int) -> int:
        """Return the bytes of a stage with a KV cache of `kv_tokens` positions."""
        return self.weight_bytes(layers) + self.kv_bytes_per_token * kv_tokens * len(layers)
