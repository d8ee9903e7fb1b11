"""Checks the inputs of a step, before anything changes, and makes up inputs for trials."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.failures import SequencesFailed

Masks = npt.NDArray[np.uint8]
"""Masks as tasks carry them: [masked sequences, bytes]."""

_WIRE_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class TaskInputs:
    """The inputs that a stage takes.

    Attributes:
        layers: of the stage.
        hidden_size: width of the hidden states.
        source_size: width of those of what an encoder reads.
        vocab_size: exclusive upper bound of token ids.
        encoder_layers: of the whole model; 0: it is a decoder alone.
    """

    layers: LayerRange
    hidden_size: int
    vocab_size: int
    source_size: int = 0
    encoder_layers: int = 0

    def begins_with(self, *, source: bool) -> bool:
        """Return whether a step begins at this stage, which is given no hidden states then.

        Args:
            source: whether the step computes what an encoder reads.
        """
        first = 0 if source else self.encoder_layers
        return self.layers.start <= first < self.layers.stop

    def made_up(self, total: int, *, source: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return random token ids and hidden states of `total` tokens, as `Stage.run` takes them.

        They are random so that mixture-of-experts layers choose experts about as for real tokens,
        and the same at every call.

        Args:
            total: number of tokens.
            source: whether the step computes what an encoder reads.
        """
        draw = torch.Generator().manual_seed(0)
        token_ids = torch.randint(self.vocab_size, (total,), generator=draw, dtype=torch.int32)
        if self.begins_with(source=source):
            return token_ids, None
        return token_ids, torch.randn(total, self._width(source=source), generator=draw)

    def check(
        self,
        sequences: Sequence[SequenceSlice],
        token_ids: Tensor,
        hidden_states: Tensor | None,
        masks: Masks | None = None,
    ) -> None:
        """Refuse inputs that do not fit each other or the stage; see `Stage.run`.

        Raises:
            SequencesFailed: some sequences do not fit, with the reason.
            StageError: with the reason.
        """
        total = sum(part.num_tokens for part in sequences)
        if not sequences or token_ids.shape != (total,):
            raise StageError(
                f"the task has {list(token_ids.shape)} token ids for {total} positions"
            )
        if len({part.sequence_id for part in sequences}) != len(sequences):
            raise StageError("the task names a sequence twice")
        self._check_token_ids(sequences, token_ids)
        source = self._check_kind(sequences)
        if not self.begins_with(source=source):
            self._check_hidden_states(hidden_states, (total, self._width(source=source)))
        elif hidden_states is not None:
            raise StageError("the first stage was given hidden states")
        _check_masks(sequences, masks)
        for part in sequences:
            _check_prefix(part, sequences)

    def _check_kind(self, sequences: Sequence[SequenceSlice]) -> bool:
        """Return whether a step computes what an encoder reads; refuse a mixed one."""
        sources = [part for part in sequences if part.is_source]
        if any(bool(self.encoder_layers) != bool(part.source) for part in sequences):
            raise StageError(
                f"the task has sources of {[part.source for part in sequences]} tokens, but the "
                f"model's encoder has {self.encoder_layers} layers"
            )
        if not sources:
            if self.layers.stop <= self.encoder_layers:
                raise StageError(f"stage {self.layers} has no layers for answers")
            return False
        if len(sources) < len(sequences):
            raise StageError("the task has tokens of sources and of answers")
        for part in sources:
            if (part.start, part.num_tokens) != (0, part.source) or part.sample or part.embed:
                why = f"the source of sequence {part.sequence_id} is not computed as a whole"
                raise SequencesFailed([part.sequence_id], StageError(why))
        return True

    def _check_token_ids(self, sequences: Sequence[SequenceSlice], token_ids: Tensor) -> None:
        lowest, highest = (int(value) for value in token_ids.aminmax())
        if 0 <= lowest <= highest < self.vocab_size:
            return
        pieces = torch.split(token_ids, [part.num_tokens for part in sequences])
        named = [
            part.sequence_id
            for part, piece in zip(sequences, pieces, strict=True)
            if not bool(((piece >= 0) & (piece < self.vocab_size)).all())
        ]
        why = (
            f"the task has token ids from {lowest} to {highest}, but the model knows "
            f"{self.vocab_size}: the prompt was tokenized for another model"
        )
        raise SequencesFailed(named, StageError(why))

    def _width(self, *, source: bool) -> int:
        return self.source_size if source else self.hidden_size

    def _check_hidden_states(self, hidden_states: Tensor | None, shape: tuple[int, int]) -> None:
        wanted = f"floats of shape {list(shape)}"
        if hidden_states is None:
            raise StageError(f"stage {self.layers} was given no hidden states; it needs {wanted}")
        if hidden_states.shape != shape or hidden_states.dtype not in _WIRE_DTYPES:
            raise StageError(
                f"stage {self.layers} was given hidden states {hidden_states.dtype} of shape "
                f"{list(hidden_states.shape)}; it needs {wanted}"
            )


def _check_masks(sequences: Sequence[SequenceSlice], masks: Masks | None) -> None:
    masked = [part for part in sequences if part.masked]
    if not all(part.sample for part in masked):
        raise StageError("the task has a mask for a sequence that samples no token")
    if masked and (masks is None or masks.dtype != np.uint8 or masks.ndim != 2):
        raise StageError("the task's masks are no bytes")
    if len(masked) != (0 if masks is None else len(masks)):
        raise StageError(f"the task has other than {len(masked)} masks")


def _check_prefix(part: SequenceSlice, sequences: Sequence[SequenceSlice]) -> None:
    prefix = part.prefix
    if prefix is None:
        return
    if prefix.length != part.start:
        why = (
            f"sequence {part.sequence_id} starts at {part.start}, its prefix ends at "
            f"{prefix.length}"
        )
        raise SequencesFailed([part.sequence_id], StageError(why))
    if prefix.take and any(other.sequence_id == prefix.sequence_id for other in sequences):
        why = f"sequence {prefix.sequence_id} is computed and taken at once"
        raise SequencesFailed([part.sequence_id], StageError(why))
