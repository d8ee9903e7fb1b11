"""Why a stage could not run a step, as far as single sequences are the reason."""

from collections.abc import Sequence

from distributed_llm.common.errors import DistributedLLMError, StageError
from distributed_llm.common.messages import MissingPositions
from distributed_llm.common.types import SequenceId


class MissingPositionsError(StageError):
    """A task starts sequences beyond the positions that the KV cache holds. Nothing was changed.

    Args:
        missing: these sequences, and how many positions of each are held.

    Attributes:
        missing: as given.
    """

    def __init__(self, missing: tuple[MissingPositions, ...]) -> None:
        held = ", ".join(f"{m.have} of sequence {m.sequence_id}" for m in missing)
        super().__init__(f"positions are missing in the KV cache; held are {held}")
        self.missing = missing


class ReleasedSequence(StageError):
    """A task names a released sequence, so it is late and void. Nothing was changed."""


class SequencesFailed(StageError):
    """Some sequences of a step cannot be computed; the others have no part in it.

    Args:
        sequence_ids: these sequences.
        cause: the error to report.

    Attributes:
        sequence_ids: as given.
        cause: as given.
    """

    def __init__(self, sequence_ids: Sequence[SequenceId], cause: DistributedLLMError) -> None:
        super().__init__(str(cause))
        self.sequence_ids = tuple(sequence_ids)
        self.cause = cause
