"""The memory that the layers of a model take. Pure values."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from distributed_llm.common.layer_sharing import pieces
from distributed_llm.common.layer_states import HELD_STATES
from distributed_llm.common.offloading import LAYERS_AT_ONCE, layers_away
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.wording import layers_text
from distributed_llm.coordinator.kv_windows import StageKV

_ACROSS = 1 / 8
"""Share of a decoder layer that a source needs: the keys and values of attention across to it."""


@dataclass(frozen=True)
class ModelCost:
    """The memory that the parts of a model take, in bytes.

    Attributes:
        layer_bytes: weights of each layer, with its tables.
        first_bytes: what only the first stage needs (embedding).
        last_bytes: what only the last stage needs (norm, head).
        shared_bytes: a matrix that several stages need: a tied embedding, or one by which encoder
            and decoder embed.
        each_bytes: what every stage needs, of all else (see `common.per_layer_inputs`).
        layer_kv_bytes: KV cache of one position in each layer.
        quantize: what floating-point weights become while they are loaded.
        layer_state_bytes: of each layer, the state of one sequence. Empty: no layer keeps one.
        windows: of each layer, how many positions a token sees, itself included; 0: all. Empty: all
            layers see everything.
        table_bytes: what each layer has of tables, outside the layers or its own, of which a step
            reads few rows, and which never lie on a disk. Empty: no layer has any.
        uncut: layers before which no stage may begin (see `common.layer_sharing`).
        shared_by: the layers of which any stage that has one needs `shared_bytes`; empty: the
            first and the last.
        encoder_layers: the first layers, which compute sources and no answers; 0: the model is a
            decoder alone.
        workspace_bytes: what a stage takes beside its weights and KV cache while it computes. It is
            taken off the memory of each worker before plans are made (`ServedModel.planned`).
    """

    layer_bytes: tuple[int, ...]
    first_bytes: int
    last_bytes: int
    shared_bytes: int
    layer_kv_bytes: tuple[int, ...]
    quantize: Quantize = "none"
    windows: tuple[int, ...] = ()
    each_bytes: int = 0
    table_bytes: tuple[int, ...] = ()
    uncut: tuple[int, ...] = ()
    layer_state_bytes: tuple[int, ...] = ()
    workspace_bytes: int = 0
    shared_by: tuple[int, ...] = ()
    encoder_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_bytes)

    def only_encodes(self, layers: LayerRange) -> bool:
        """Return whether a stage of these layers keeps nothing of sequences: all are an encoder's.

        Steps that decode do not reach it.
        """
        return layers.stop <= self.encoder_layers

    @property
    def read_bytes(self) -> tuple[int, ...]:
        """Weights of each layer that a step reads whole: all but tables."""
        tables = self.table_bytes or (0,) * self.num_layers
        return tuple(map(operator.sub, self.layer_bytes, tables))

    @property
    def answer_bytes(self) -> tuple[int, ...]:
        """Weights of each layer that a token of an answer needs: of an encoder's layers none."""
        return (0,) * self.encoder_layers + self.read_bytes[self.encoder_layers :]

    @property
    def source_bytes(self) -> tuple[float, ...]:
        """Weights of each layer that a token of a source needs, which an encoder reads.

        A decoder without an encoder reads prompts with all of its layers, and no sources.
        """
        if not self.encoder_layers:
            return (0.0,) * self.num_layers
        sizes = self.read_bytes
        across = (_ACROSS * size for size in sizes[self.encoder_layers :])
        return (*sizes[: self.encoder_layers], *across)

    @property
    def all_layer_bytes(self) -> int:
        """Bytes of all layers, without embedding, norm and head."""
        return sum(self.layer_bytes)

    @property
    def all_weight_bytes(self) -> int:
        """Bytes of all weights, each once."""
        return self.weight_bytes(LayerRange(0, self.num_layers))

    @property
    def mean_kv_bytes(self) -> float:
        """Bytes of KV cache that one position takes in a layer, on average."""
        return sum(self.layer_kv_bytes) / self.num_layers

    def kv_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of KV cache that one position takes in these layers."""
        return sum(self.layer_kv_bytes[layers.start : layers.stop])

    def state_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of a state of one sequence in these layers."""
        return sum(self.layer_state_bytes[layers.start : layers.stop])

    @property
    def layer_fixed_bytes(self) -> tuple[int, ...]:
        """Bytes that each layer takes if one sequence runs, without its KV cache."""
        states = self.layer_state_bytes or (0,) * self.num_layers
        sizes = zip(self.layer_bytes, states, strict=True)
        return tuple(weights + HELD_STATES * state for weights, state in sizes)

    def kept_by(self, layers: LayerRange, tokens: int) -> StageKV:
        """Return what these layers keep of sequences.

        Args:
            layers: of a stage.
            tokens: positions that it has room for.
        """
        windows = self.windows[layers.start : layers.stop]
        sizes = self.layer_kv_bytes[layers.start : layers.stop]
        windowed = sum(size for size, window in zip(sizes, windows, strict=False) if window)
        window = max(windows, default=0)
        return StageKV(tokens, sum(sizes), window, windowed, self.state_bytes(layers))

    def weight_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of weights that a stage of these layers holds."""
        first, last = layers.start == 0, layers.stop == self.num_layers
        return (
            sum(self.layer_bytes[layers.start : layers.stop])
            + self.first_bytes * first
            + self.last_bytes * last
            + self.shared_bytes * self.shares(layers)
            + self.each_bytes
        )

    @property
    def sharers(self) -> tuple[int, ...]:
        """The layers of which any stage that has one needs `shared_bytes`."""
        return self.shared_by or (0, self.num_layers - 1)

    def shares(self, layers: LayerRange) -> bool:
        """Return whether a stage of these layers needs `shared_bytes`."""
        return any(layers.start <= layer < layers.stop for layer in self.sharers)

    @property
    def pieces(self) -> list[LayerRange]:
        """The smallest ranges of layers that a stage may have."""
        return pieces(self.num_layers, self.uncut)

    @property
    def largest_piece(self) -> LayerRange:
        """The smallest range of layers that a stage may have where that is largest."""
        return max(self.pieces, key=len)

    @property
    def together_text(self) -> str:
        """Which layers cannot be parted, and why; empty if all can be."""
        if len(self.largest_piece) == 1:
            return ""
        return (
            f"{layers_text(self.largest_piece)} have to be on one worker, for some read keys and "
            "values of others"
        )

    def may_be_cut(self, starts: Iterable[int]) -> bool:
        """Return whether stages may begin with these layers."""
        return not set(starts).intersection(self.uncut)

    def bytes_on_device(self, layers: LayerRange, count: int) -> int:
        """Return the bytes of weights on the device of a stage if `count` layers are away."""
        saved = sorted(self.sizes_away(layers_away(layers, count)))[:-LAYERS_AT_ONCE]
        return self.weight_bytes(layers) - sum(saved)

    def sizes_away(self, gone: Iterable[int]) -> list[int]:
        """Return the bytes that each of some layers, by number, takes in another place."""
        sizes = self.read_bytes
        return [sizes[layer] for layer in gone]

    def stage_bytes(self, layers: LayerRange, kv_tokens: int) -> int:
        """Return the bytes of a stage with a sequence, and `kv_tokens` positions of KV cache."""
        states = HELD_STATES * self.state_bytes(layers)
        return self.weight_bytes(layers) + states + self.kv_bytes(layers) * kv_tokens
