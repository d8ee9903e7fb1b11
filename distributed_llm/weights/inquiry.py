"""What the coordinator has said of a model's weights, and what to ask it next. Does no I/O."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distributed_llm.common import codec
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import FetchFailed, RemoteProtocolError
from distributed_llm.common.messages import (
    DigestsReport,
    GetDigests,
    GetModel,
    ModelDescription,
    ModelReport,
    ModelSource,
)
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import LayerRange
from distributed_llm.weights.fetching.fetching import PATIENCE_S


@dataclass(frozen=True)
class Told:
    """What an answer about digests has brought.

    Attributes:
        found: tensors whose digest is known now, each with its SHA-256, in the order of loading.
        lost: names of those that the coordinator cannot get.
        why: it cannot, for people.
    """

    found: tuple[tuple[TensorInfo, str], ...] = ()
    lost: tuple[str, ...] = ()
    why: str = ""


class Inquiry:
    """The questions of one fetch to the coordinator.

    Args:
        source: of the model, as the coordinator names it.
        layers: whose tensors are wanted.
        now: clock seconds.

    Attributes:
        model: what the model consists of; None until that is said.
        total_bytes: of the tensors that are wanted.
    """

    def __init__(self, source: ModelSource, layers: LayerRange, now: float) -> None:
        self._source = source
        self._layers = layers
        self._answer_by = now + PATIENCE_S
        self._checkpoint: Checkpoint | None = None
        self._unknown: dict[str, TensorInfo] = {}  # by name; those whose digest is not known yet
        self._layers_of: dict[str, frozenset[int]] = {}  # by SHA-256; empty outside the layers
        self._progress_there = -1
        self._doing = ""
        self.model: ModelDescription | None = None
        self.total_bytes = 0

    # -------------------------------------------------------------- what is asked

    def begin(self, checkpoint: Checkpoint) -> None:
        """Ask about the tensors of the layers.

        Args:
            checkpoint: made of `model`.

        Raises:
            CheckpointError: it lacks some of them.
        """
        tensors = sorted(
            checkpoint.tensors_of(self._layers),
            key=lambda tensor: _loading_order(checkpoint, tensor),
        )
        self._checkpoint = checkpoint
        self._unknown = {tensor.name: tensor for tensor in tensors}
        self.total_bytes = sum(tensor.nbytes for tensor in tensors)

    @property
    def unknown(self) -> list[TensorInfo]:
        """The tensors that are wanted, and of which neither digest nor place is known."""
        return list(self._unknown.values())

    @property
    def not_told(self) -> str:
        """What only the coordinator can tell, and has not; empty if nothing."""
        if self.model is None:
            return "what the model consists of"
        return "what its tensors hash to" if self._unknown else ""

    @property
    def doing(self) -> str:
        """What the coordinator is at, for people; empty if nothing is waited for."""
        return self._doing if self._unknown else ""

    def question(self, now: float) -> GetModel | GetDigests | None:
        """Return what to ask the coordinator now; None if nothing."""
        if self.model is None:
            return GetModel(source=self._source)
        if not self._unknown:
            return None
        self._answer_by = min(self._answer_by, now + PATIENCE_S)
        return GetDigests(source=self._source, layers=self._layers)

    def is_overdue(self, now: float) -> bool:
        """Return whether an answer takes too long."""
        return now >= self._answer_by and bool(self.not_told)

    # -------------------------------------------------------------- what is said

    def model_told(self, report: ModelReport, frames: tuple[Frame, ...]) -> None:
        """Take what the coordinator says of the model.

        Raises:
            FetchFailed: that is nothing, or cannot be read.
        """
        if self.model is not None:
            return
        self._answer_by = math.inf
        if report.message or not frames:
            raise FetchFailed(report.message or "The coordinator describes no model.")
        try:
            self.model = codec.decode_model(frames[0])
        except RemoteProtocolError as exc:
            raise FetchFailed(f"What the coordinator says of the model is broken: {exc}") from exc

    def digests_told(
        self, report: DigestsReport, frames: tuple[Frame, ...], on_progress: Callable[[], None]
    ) -> Told:
        """Take what the coordinator says of digests.

        Args:
            on_progress: called if it has got on with those that it does not know.

        Raises:
            FetchFailed: it cannot be read.
        """
        if report.layers != self._layers or not self._unknown:
            return Told()
        self._answer_by = math.inf
        if report.progress != self._progress_there:
            self._progress_there = report.progress
            on_progress()
        self._doing = f"the coordinator {report.doing}" if report.doing else ""
        try:
            known = codec.decode_digests(frames[0]).sha256 if frames else {}
        except RemoteProtocolError as exc:
            raise FetchFailed(f"What the coordinator says of the weights is broken: {exc}") from exc
        found = tuple((one, known[one.name]) for one in self.unknown if one.name in known)
        for tensor, sha256 in found:
            del self._unknown[tensor.name]
            self._learn_layer(tensor.name, sha256)
        if not report.failure:
            return Told(found)
        lost = tuple(self._unknown)
        self._unknown = {}
        return Told(found, lost, f"The coordinator cannot give these weights: {report.failure}")

    def placed(self, names: Iterable[str]) -> list[str]:
        """Take those of some tensors off the question that are in it, and return them."""
        return [name for name in names if self._unknown.pop(name, None) is not None]

    def holder(self, layers: Iterable[LayerRange]) -> Callable[[str], bool]:
        """Return a function that tells, by SHA-256, what a worker with `layers` should have."""
        held = {layer for one in layers for layer in range(one.start, one.stop)}

        def holds(sha256: str) -> bool:
            needed_by = self._layers_of.get(sha256, frozenset())
            return not needed_by or not needed_by.isdisjoint(held)

        return holds

    def _learn_layer(self, name: str, sha256: str) -> None:
        assert self._checkpoint is not None
        layer = self._checkpoint.layer_of(name)
        known = self._layers_of.get(sha256, frozenset())
        self._layers_of[sha256] = known | ({layer} if layer is not None else set())


def _loading_order(
    checkpoint: Checkpoint, tensor: TensorInfo
) -> tuple[int, list[tuple[int, int | str]]]:
    """Return a key that sorts tensors as they are loaded: layer by layer, and then the others."""
    layer = checkpoint.layer_of(tensor.name)
    parts = tensor.name.split(".")
    return (
        checkpoint.num_layers if layer is None else layer,
        [(0, int(part)) if part.isdigit() else (1, part) for part in parts],
    )
