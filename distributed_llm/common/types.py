"""Identifiers, bounded numbers and layer ranges, for all parts of the package."""

from typing import Annotated, NewType

import msgspec

WorkerId = NewType("WorkerId", str)
"""The name of a worker, made unique among the connected workers by the coordinator."""

PeerId = NewType("PeerId", bytes)
"""The address of one connection, made up by the ROUTER socket; a new one after reconnecting."""

KV_BLOCK = 64
"""Positions in one block; KV cache is allocated and charged in blocks."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]

Epoch = NewType("Epoch", Count)
"""The number of a plan, "plan 3" in texts for people. Every new plan has a larger one."""

NO_EPOCH = Epoch(0)
"""The epoch before the first plan."""

StepNumber = NewType("StepNumber", Count)
"""The number of a step of one pipeline, from 1; a step that is computed again gets a new one."""

SequenceId = NewType("SequenceId", Count)
"""Names the KV cache of one sequence on the stages of a pipeline; never used for another."""


class Outline(msgspec.Struct, frozen=True):
    """What can be read of a message that cannot be read as a whole.

    Attributes:
        type: tag of the message's class; empty if there is none.
        epoch: of the plan that it belongs to; None if it names none, like the others.
        step: of the step that it belongs to.
        request_id: of the request that it belongs to.
    """

    type: Annotated[str, msgspec.Meta(max_length=64)] = ""
    epoch: Epoch | None = None
    step: StepNumber | None = None
    request_id: Annotated[str, msgspec.Meta(max_length=64)] | None = None


class LayerRange(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """Consecutive transformer layers `[start, stop)`, counted from 0.

    Texts for people and settings count them from 1 and include both ends: `str` of [0, 8) is "1-8",
    of [8, 9) it is "9".

    Raises:
        ValueError: the range is empty.
    """

    start: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    stop: Annotated[int, msgspec.Meta(ge=1, le=65536)]

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise ValueError(f"layer range [{self.start}, {self.stop}) is empty")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return str(self.stop) if len(self) == 1 else f"{self.start + 1}-{self.stop}"
