"""Where workers ask the coordinator for weights: answers each request, or has it answered."""

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.messages import (
    DigestsReport,
    GetDigests,
    GetModel,
    ModelReport,
    ModelSource,
    ReadChunk,
    TensorDigests,
    WeightRequest,
)
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.weights.giving.giver import Answer, Giver
from distributed_llm.weights.giving.library import Library


class Desk:
    """Answers requests about the weights of one model; to be used in a running event loop.

    Args:
        library: with the weights of the model.
        answer: sends an answer to who asked.
        max_bytes_per_s: of weights, to all readers together; None is without limit.
    """

    def __init__(self, library: Library, answer: Answer, *, max_bytes_per_s: int | None) -> None:
        self._library = library
        self._answer = answer
        self._giver = Giver(library.shelf, answer, max_bytes_per_s=max_bytes_per_s)

    def asked(self, peer: PeerId, request: WeightRequest) -> None:
        """Answer a request, soon."""
        match request:
            case ReadChunk():
                self._giver.asked(peer, request)
            case GetModel(source=source):
                self._describe(peer, source)
            case GetDigests():
                self._tell_digests(peer, request)

    def close(self) -> None:
        """Answer nothing any more."""
        self._giver.close()
        self._library.close()

    def _describe(self, peer: PeerId, source: ModelSource) -> None:
        if why := self._other_model(source):
            self._answer(peer, ModelReport(message=why), ())
            return
        spec, frame = frame_of_bytes(encode_payload(self._library.description))
        self._answer(peer, ModelReport(tensors=(spec,)), (frame,))

    def _tell_digests(self, peer: PeerId, request: GetDigests) -> None:
        why = self._other_model(request.source)
        if not why and request.layers.stop > self._library.num_layers:
            why = f"The model has {self._library.num_layers} layers, not {request.layers.stop}."
        if why:
            self._answer(peer, DigestsReport(layers=request.layers, failure=why), ())
            return
        library = self._library
        digests = library.digests(request.layers)
        spec, frame = frame_of_bytes(encode_payload(TensorDigests(sha256=digests.sha256)))
        report = DigestsReport(
            layers=request.layers,
            tensors=(spec,),
            complete=digests.complete,
            progress=library.progress,
            doing=library.doing,
            failure=digests.failure,
        )
        self._answer(peer, report, (frame,))

    def _other_model(self, source: ModelSource) -> str:
        if source == self._library.source:
            return ""
        return f"The coordinator serves {self._library.source.name or 'another model'} by now."
