"""What a fetch asks the coordinator: what the model consists of, and what its tensors hash to.

It goes on asking until all is known. Tensors that another program of this machine got from the hub
are taken from there, and not asked about.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

from distributed_llm.common import codec
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, RemoteProtocolError
from distributed_llm.common.hub import held_file
from distributed_llm.common.messages import (
    DigestsReport,
    GetDigests,
    GetModel,
    ModelReport,
    ModelSource,
    WeightRequest,
)
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import LayerRange
from distributed_llm.weights.arrivals import Arrivals, FetchFailed
from distributed_llm.weights.fetch_disk import FetchDisk
from distributed_llm.weights.fetching.fetching import PATIENCE_S
from distributed_llm.weights.giving.shelf import Place, places_in_file

logger = logging.getLogger(__name__)

COORDINATOR = "the coordinator"
"""Name of the coordinator among the sources."""


class Want(Protocol):
    """Has tensors fetched whose digests are known now: SHA-256 by the tensor that has it."""

    def __call__(self, found: dict[str, tuple[TensorInfo, str]], *, last: bool) -> None:
        """Have them fetched; `last` says whether there will be no more."""


class Inquiry:
    """Asks the coordinator about one model; made and used in a running event loop.

    Args:
        source: of the model, as the coordinator names it.
        layers: whose tensors are wanted.
        send: sends a request to the coordinator, if it is connected.
        arrivals: that are told what becomes known, and what fails.
        disk: of the fetch.
        want: has tensors fetched.
        on_progress: called when the coordinator has got on.

    Attributes:
        checkpoint: that the coordinator describes; None before `begin`.
        total_bytes: of all tensors that are wanted.
    """

    def __init__(
        self,
        source: ModelSource,
        layers: LayerRange,
        *,
        send: Callable[[WeightRequest], None],
        arrivals: Arrivals,
        disk: FetchDisk,
        want: Want,
        on_progress: Callable[[], None],
    ) -> None:
        self.checkpoint: Checkpoint | None = None
        self.total_bytes = 0
        self._source = source
        self._layers = layers
        self._send = send
        self._arrivals = arrivals
        self._disk = disk
        self._want = want
        self._on_progress = on_progress
        self._unknown: dict[str, TensorInfo] = {}  # by name; those whose digest is not known yet
        self._doing = f"asks {COORDINATOR}"
        self._progress_there = -1
        self._looks = False  # into the hub's cache
        self._answer_by = self._now() + PATIENCE_S

    @property
    def not_told(self) -> str:
        """What only the coordinator can tell, and has not; empty if nothing."""
        if not self._arrivals.is_model_known:
            return "what the model consists of"
        return "what its tensors hash to" if self._unknown else ""

    @property
    def doing(self) -> str:
        """What the coordinator is at, for people; empty if nothing is to be told by it."""
        return self._doing if self.not_told else ""

    def begin(self, checkpoint: Checkpoint) -> None:
        """Ask about the tensors of a checkpoint, which was made of what the coordinator told."""
        try:
            tensors = sorted(checkpoint.tensors_of(self._layers), key=_loading_order)
        except CheckpointError as exc:
            self._arrivals.fail(exc)
            return
        self.checkpoint = checkpoint
        self._unknown = {tensor.name: tensor for tensor in tensors}
        self.total_bytes = sum(tensor.nbytes for tensor in tensors)
        self.ask()

    def ask(self) -> None:
        """Ask for what is not known yet."""
        if not self._arrivals.is_model_known:
            self._send(GetModel(source=self._source))
        elif self._unknown and not self._looks:
            self._looks = True
            self._disk.job(self._look_in_hub_cache, self._found_in_hub_cache)

    def fail_if_late(self) -> None:
        """Fail if the coordinator has not answered for long."""
        if self._now() >= self._answer_by:
            self.fail_if_not_told("it does not answer. It may be busy, or the network be cut.")

    def fail_if_not_told(self, why: str) -> None:
        """Fail if something is not known: the coordinator will say nothing any more."""
        if what := self.not_told:
            text = f"The coordinator does not say {what}: {why}"
            self._arrivals.fail(FetchFailed(text))

    # -------------------------------------------------------------- answers

    def model_told(self, report: ModelReport, frames: tuple[Frame, ...]) -> None:
        """Take what the model consists of."""
        if self._arrivals.is_model_known:
            return
        self._answer_by = math.inf
        if report.message or not frames:
            why = report.message or "The coordinator describes no model."
            self._arrivals.fail(FetchFailed(why))
            return
        try:
            self._arrivals.describe(codec.decode_model(frames[0]))
        except RemoteProtocolError as exc:
            why = f"What the coordinator says of the model is broken: {exc}"
            self._arrivals.fail(FetchFailed(why))

    def digests_told(self, report: DigestsReport, frames: tuple[Frame, ...]) -> None:
        """Take digests, or why there will be none."""
        if report.layers != self._layers or not self._unknown:
            return
        self._answer_by = math.inf
        if report.progress != self._progress_there:
            self._progress_there = report.progress
            self._on_progress()
        going_on = report.doing and not report.complete
        self._doing = f"{COORDINATOR} {report.doing}" if going_on else ""
        try:
            known = codec.decode_digests(frames[0]).sha256 if frames else {}
        except RemoteProtocolError as exc:
            why = f"What the coordinator says of the weights is broken: {exc}"
            self._arrivals.fail(FetchFailed(why))
            return
        names = [name for name in self._unknown if name in known]
        found = {name: (self._unknown.pop(name), known[name]) for name in names}
        if report.failure:
            why = f"The coordinator cannot give these weights: {report.failure}"
            self._arrivals.lose(self._unknown, why)
            self._unknown = {}
        if found or not self._unknown:
            self._want(found, last=not self._unknown)

    # -------------------------------------------------------------- the hub's cache

    def _look_in_hub_cache(self) -> dict[str, Place]:
        """Return where tensors are that another program of this machine got from the hub.

        The coordinator itself may be that, on this machine.
        """
        if self._source.kind != "hub":
            return {}
        by_file: dict[str, list[TensorInfo]] = {}
        for tensor in list(self._unknown.values()):
            by_file.setdefault(tensor.file, []).append(tensor)
        places: dict[str, Place] = {}
        for name, tensors in by_file.items():
            try:
                if (file := held_file(self._source, name)) is not None:
                    found = places_in_file(file, tensors)
                    places.update(zip((one.name for one in tensors), found, strict=True))
            except CheckpointError as exc:
                logger.warning("%s Asking other machines for these weights.", exc)
        return places

    def _found_in_hub_cache(self, places: dict[str, Place]) -> None:
        """Use what was found, and ask the coordinator about the others."""
        self._looks = False
        found = {name: place for name, place in places.items() if name in self._unknown}
        for name, place in found.items():
            del self._unknown[name]
            self._arrivals.put(name, place)
        if found and not self._unknown:
            self._want({}, last=True)
        if self._unknown:
            self._answer_by = min(self._answer_by, self._now() + PATIENCE_S)
            self._send(GetDigests(source=self._source, layers=self._layers))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _loading_order(tensor: TensorInfo) -> list[tuple[int, int | str]]:
    """Return a key that sorts tensors as transformers loads them."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in tensor.name.split(".")]
