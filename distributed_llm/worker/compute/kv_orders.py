"""Carries out the KV cache orders of a move in the compute thread: export, import, assemble.

The served stage exports. The prepared stage, which was loaded beside it, imports what other workers
exported, and assembles its KV cache from the served stage's and the imports.
"""

from typing import assert_never

from distributed_llm.common.messages import KVEnd, KVPieces
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.compute.loading import PreparedStage
from distributed_llm.worker.kv.held_transfer import HeldExporter
from distributed_llm.worker.kv.manifest import KVTransferError
from distributed_llm.worker.kv.wire import (
    MAX_PIECES_BYTES,
    MAX_PIECES_SENT,
    decode_end,
    decode_pieces,
    encode_end,
    encode_pieces,
)
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import (
    AssembleKV,
    ExportKV,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
)


class KVExports:
    """The exporters of the served stage, one per transfer."""

    def __init__(self) -> None:
        self._exporters: dict[tuple[int, LayerRange], HeldExporter] = {}  # by new epoch and layers

    def next(self, order: ExportKV, served: Stage | None) -> KVExported:
        """Return the next message of a transfer.

        Raises:
            KVTransferError: these layers are not served here.
        """
        exporter = self._exporter(order, served)
        epoch, layers, number = order.epoch, order.layers, order.number
        rest = order.set_back if order.rest else None
        pieces = exporter.next_chunk(MAX_PIECES_BYTES, MAX_PIECES_SENT, rest)
        if pieces is not None:
            return KVExported(order, *encode_pieces(epoch, layers, number, pieces))
        if not order.rest:
            return KVExported(order, None)
        assert served is not None
        manifest = served.kv_manifest(order.set_back)
        return KVExported(order, *encode_end(epoch, layers, number, manifest))

    def end(self, epoch: Epoch) -> None:
        """Forget the transfers to `epoch`."""
        self._exporters = {key: out for key, out in self._exporters.items() if key[0] != epoch}

    def clear(self) -> None:
        """Forget all transfers: the stage is no longer served."""
        self._exporters.clear()

    def _exporter(self, order: ExportKV, served: Stage | None) -> HeldExporter:
        key = (order.epoch, order.layers)
        if key not in self._exporters:
            if served is None:
                raise KVTransferError(
                    f"{layers_text(order.layers)} are to be sent; none are served here"
                )
            try:
                self._exporters[key] = served.export_kv(order.layers)
            except ValueError as exc:
                raise KVTransferError(f"not all layers to be sent are here: {exc}") from exc
        return self._exporters[key]


def import_kv(order: ImportKV, prepared: PreparedStage | None) -> KVImported:
    """Add a message of another worker to what the prepared stage has received.

    Raises:
        KVTransferError: no stage of that epoch is prepared here, nobody announced these layers, or
            the message is damaged.
    """
    message = order.message
    receiver = _of_epoch(prepared, message.epoch)
    importer = receiver.importers.get(message.layers)
    if importer is None:
        raise KVTransferError(
            f"KV cache of {layers_text(message.layers)} came, which nobody announced"
        )
    match message:
        case KVPieces():
            layouts, of_states = importer.positions.layouts, importer.states.layouts
            for piece in decode_pieces(message, order.frames, layouts, of_states):
                importer.add(piece)
        case KVEnd():
            importer.update(decode_end(message, order.frames))
        case _:
            assert_never(message)
    receiver.imported_bytes = sum(each.nbytes for each in receiver.importers.values())
    return KVImported(order)


def assemble_kv(
    order: AssembleKV, served: Stage | None, prepared: PreparedStage | None
) -> KVAssembled:
    """Assemble the prepared stage's KV cache from the served stage's and from the imports.

    Raises:
        KVTransferError: no stage of that epoch is prepared here, or not all has arrived.
    """
    receiver = _of_epoch(prepared, order.epoch)
    receiver.stage.assemble_kv(served, list(receiver.importers.values()))
    receiver.importers.clear()
    return KVAssembled(order)


def _of_epoch(prepared: PreparedStage | None, epoch: Epoch) -> PreparedStage:
    if prepared is None or prepared.order.epoch != epoch:
        raise KVTransferError(f"no layers of plan {epoch} are loaded here beside the served ones")
    return prepared
