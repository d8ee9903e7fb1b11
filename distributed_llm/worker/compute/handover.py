"""KV cache that leaves the served stage of a worker, and that comes for the one beside it."""

from distributed_llm.common.messages import KVEnd, KVPieces
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.compute.loading import Beside
from distributed_llm.worker.kv.manifest import KVTransferError
from distributed_llm.worker.kv.transfer import KVExporter
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
    Export,
    Exported,
    Import,
    Imported,
    Inherit,
    Inherited,
)


class Exports:
    """What goes from the served stage to other workers, by the epoch that it goes to."""

    def __init__(self) -> None:
        self._exporters: dict[tuple[int, LayerRange], KVExporter] = {}

    def next(self, order: Export, served: Stage | None) -> Exported:
        """Return the next message of a transfer.

        Raises:
            KVTransferError: these layers are not served here.
        """
        exporter = self._exporter(order, served)
        pieces = exporter.next_chunk(MAX_PIECES_BYTES, MAX_PIECES_SENT)
        if pieces is not None:
            return Exported(order, *encode_pieces(order.epoch, order.layers, order.number, pieces))
        if not order.rest:
            return Exported(order, None)
        assert served is not None
        held = served.kv_manifest()
        return Exported(order, *encode_end(order.epoch, order.layers, order.number, held))

    def end(self, epoch: int) -> None:
        """Forget what goes to this epoch."""
        self._exporters = {key: out for key, out in self._exporters.items() if key[0] != epoch}

    def clear(self) -> None:
        """Forget all: the stage is not served any more."""
        self._exporters.clear()

    def _exporter(self, order: Export, served: Stage | None) -> KVExporter:
        key = (order.epoch, order.layers)
        if key not in self._exporters:
            if served is None:
                raise KVTransferError(f"layers {order.layers} are to be sent; none are served here")
            try:
                self._exporters[key] = served.export_kv(order.layers)
            except ValueError as exc:
                raise KVTransferError(f"not all that is to be sent is here: {exc}") from exc
        return self._exporters[key]


def take(order: Import, beside: Beside | None) -> Imported:
    """Keep what another worker sent.

    Raises:
        KVTransferError: nobody waits for it here, or it is not what it should be.
    """
    message = order.message
    heir = _of_epoch(beside, message.epoch)
    importer = heir.importers.get(message.layers)
    if importer is None:
        raise KVTransferError(f"KV cache of layers {message.layers} came, which nobody announced")
    match message:
        case KVPieces():
            for piece in decode_pieces(message, order.frames, importer.layouts):
                importer.add(piece)
        case KVEnd():
            importer.update(decode_end(message, order.frames))
    heir.imported_bytes = sum(each.nbytes for each in heir.importers.values())
    return Imported(order)


def inherit(order: Inherit, served: Stage | None, beside: Beside | None) -> Inherited:
    """Let the stage beside the served one take over its KV cache and what was imported.

    Raises:
        KVTransferError: not all has arrived, or there is no such stage.
    """
    heir = _of_epoch(beside, order.epoch)
    heir.stage.take_over(served, list(heir.importers.values()))
    heir.importers.clear()
    return Inherited(order)


def _of_epoch(beside: Beside | None, epoch: int) -> Beside:
    if beside is None or beside.order.epoch != epoch:
        raise KVTransferError(f"no layers of epoch {epoch} are loaded here beside the served ones")
    return beside
