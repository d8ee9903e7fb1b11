"""The two ends of a transfer of all that a stage holds of sequences: KV cache, then states."""

from collections.abc import Collection, Sequence
from typing import assert_never

from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.state_transfer import StateExporter, StateImporter, StatePiece
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter, KVPiece

Piece = KVPiece | StatePiece


class HeldExporter:
    """Exports what a stage holds in some layers, in the thread that runs its steps.

    Args:
        positions: exports keys and values.
        states: exports states.
    """

    def __init__(self, positions: KVExporter, states: StateExporter) -> None:
        self._positions = positions
        self._states = states

    def next_chunk(
        self, max_bytes: int, max_pieces: int, rest: Collection[SequenceId] | None = None
    ) -> Sequence[Piece] | None:
        """Return the next pieces, or None if all is exported; not to be called in a step.

        Args:
            max_bytes: of all pieces together; exceeded only by a single position or number.
            max_pieces: at least one.
            rest: None while steps run; then, see `StateExporter.next_chunk`.
        """
        positions = self._positions.next_chunk(max_bytes, max_pieces)
        return positions or self._states.next_chunk(max_bytes, max_pieces, rest)


class HeldImporter:
    """Collects the pieces of one exporter on another worker.

    Args:
        positions: collects keys and values.
        states: collects states.

    Attributes:
        positions: as given; it has the sender's manifest.
        states: as given.
    """

    def __init__(self, positions: KVImporter, states: StateImporter) -> None:
        self.positions = positions
        self.states = states

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all takes which has arrived."""
        return self.positions.nbytes + self.states.nbytes

    def add(self, piece: Piece) -> None:
        """Keep a piece.

        Raises:
            KVTransferError: it is not one that is expected, or there is no room for it.
        """
        match piece:
            case KVPiece():
                self.positions.add(piece)
            case StatePiece():
                self.states.add(piece)
            case _:
                assert_never(piece)

    def update(self, manifest: KVManifest) -> None:
        """Set the sender's manifest, and free what is not in it.

        Raises:
            KVTransferError: the manifest contradicts itself, or describes more than there is room
                for.
        """
        self.positions.update(manifest)
        self.states.keep(manifest.states)
