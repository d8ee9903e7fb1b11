"""Transfers of a move: which layers' KV cache goes from which worker to which. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.plan import PipelineStage


@dataclass(frozen=True)
class Transfer:
    """Layers whose KV cache goes from one worker to another."""

    sender: PipelineStage
    receiver: PipelineStage
    layers: LayerRange

    @property
    def pair(self) -> tuple[WorkerId, WorkerId]:
        """Sender and receiver by name."""
        return self.sender.worker, self.receiver.worker


def transfers_between(
    old: Sequence[PipelineStage], new: Sequence[PipelineStage], encoder_layers: int = 0
) -> list[Transfer]:
    """Return what has to be sent so that the new stages have what the old ones have.

    Args:
        old: stages that serve.
        new: stages that are to go on.
        encoder_layers: the model's first layers, which keep nothing.
    """
    decoding = LayerRange(encoder_layers, new[-1].layers.stop)
    held = {stage.peer: stage.layers for stage in old}
    return [
        Transfer(sender, receiver, part)
        for receiver in new
        for missing in _without(receiver.layers, held.get(receiver.peer))
        for sender in old
        for kept in _common(missing, decoding)
        for part in _common(kept, sender.layers)
    ]


def _without(layers: LayerRange, held: LayerRange | None) -> Iterator[LayerRange]:
    """Yield the parts of `layers` that are not in `held`."""
    if held is None or held.stop <= layers.start or layers.stop <= held.start:
        yield layers
        return
    if layers.start < held.start:
        yield LayerRange(layers.start, held.start)
    if held.stop < layers.stop:
        yield LayerRange(held.stop, layers.stop)


def _common(left: LayerRange, right: LayerRange) -> Iterator[LayerRange]:
    start, stop = max(left.start, right.start), min(left.stop, right.stop)
    if start < stop:
        yield LayerRange(start, stop)
