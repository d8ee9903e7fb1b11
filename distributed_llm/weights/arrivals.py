"""What has arrived of weights that are fetched, for threads that wait for it."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future

from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.messages import ModelDescription
from distributed_llm.weights.giving.shelf import Place


class FetchFailed(CheckpointUnavailable):
    """Weights cannot be had from other machines now."""


def not_wanted() -> FetchFailed:
    """Return the error for weights that are not fetched any more."""
    return FetchFailed("The weights are not wanted any more.")


class Arrivals:
    """The tensors of one fetch that are there. Safe to use from any thread.

    Attributes:
        placed_bytes: of the tensors that are there.
        error: why nothing more comes; None while it may.
    """

    def __init__(self) -> None:
        self.placed_bytes = 0
        self.error: CheckpointError | None = None
        self._model: Future[ModelDescription] = Future()
        self._changed = threading.Condition()
        self._places: dict[str, Place] = {}
        self._lost: dict[str, str] = {}  # why, by name

    # -------------------------------------------------------------- for who waits

    def wait_for_model(self) -> ModelDescription:
        """Return what the model consists of, as soon as that is known.

        Raises:
            FetchFailed: it will not be.
        """
        return self._model.result()

    def wait_for(self, name: str) -> Place:
        """Return where a tensor is, as soon as it is there.

        Raises:
            FetchFailed: it cannot be had.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: name in self._places or name in self._lost or self.error is not None
            )
            if name in self._places:
                return self._places[name]
            raise FetchFailed(str(self.error or self._lost[name])) from self.error

    # -------------------------------------------------------------- for the thread that fetches

    @property
    def is_model_known(self) -> bool:
        """Whether it is known what the model consists of, or that this will not be known."""
        return self._model.done()

    def describe(self, model: ModelDescription) -> None:
        """Tell what the model consists of, once."""
        self._model.set_result(model)

    def put(self, name: str, place: Place) -> None:
        """Tell that a tensor is there."""
        with self._changed:
            self._places[name] = place
            self.placed_bytes += place.nbytes
            self._changed.notify_all()

    def lose(self, names: Iterable[str], why: str) -> None:
        """Tell that tensors cannot be had."""
        with self._changed:
            self._lost.update(dict.fromkeys(names, why))
            self._changed.notify_all()

    def fail(self, error: CheckpointError) -> None:
        """Let nobody wait any more; nothing after the first time."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
        if not self._model.done():
            self._model.set_exception(FetchFailed(str(error)))
