"""One step: what it computes, and what results its stages must send. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distributed_llm.common.messages import SequenceSlice, TokenLogprobs
from distributed_llm.common.tensors import (
    Frame,
    TensorSpec,
    floats_of_frame,
    token_ids_of_frame,
)
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.requests.request import Answer

FloatVector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One pass of a batch through all stages.

    Attributes:
        answers: whose tokens each slice computes, in the order of the slices.
        token_ids: of all slices, one after the other.
        masks: of the slices that are masked, which tokens may be sampled.
    """

    answers: tuple[Answer, ...]
    slices: tuple[SequenceSlice, ...]
    token_ids: tuple[int, ...]
    masks: tuple[bytes, ...] = ()

    @property
    def samplers(self) -> list[Answer]:
        """The answers that get a token from this step, in the order of the slices."""
        pairs = zip(self.answers, self.slices, strict=True)
        return [answer for answer, part in pairs if part.sample]

    @property
    def num_samples(self) -> int:
        """Tokens that the last stage samples."""
        return sum(part.sample for part in self.slices)

    @property
    def num_embeds(self) -> int:
        """Slices at whose positions the last stage sums up hidden states."""
        return sum(part.embed for part in self.slices)

    @property
    def is_source(self) -> bool:
        """Whether it computes what an encoder reads, and no answers."""
        return self.slices[0].is_source

    @property
    def decodes(self) -> bool:
        """Whether every slice is a single token of an answer: the step has no prefill chunks."""
        return len(self.token_ids) == len(self.slices) and not self.is_source


def wrong_tokens(
    step: Step, specs: Sequence[TensorSpec], frames: Sequence[Frame], model: ServedModel
) -> str:
    """Return what is wrong with the result of the last stage, or an empty text."""
    count, width = step.num_samples, _num_logprobs(step)
    wanted: tuple[TensorSpec, ...] = (TensorSpec("int32", (count,)),) if count else ()
    if width is not None:
        shape = (count, 1 + width)
        wanted += (TensorSpec("float32", shape), TensorSpec("int32", shape))
    if step.num_embeds:
        wanted += (TensorSpec("float32", (step.num_embeds, model.hidden_size)),)
    if tuple(specs) != wanted:
        return f"result {_text(specs)}, expected {_text(wanted)}"
    ints = [frame for spec, frame in zip(specs, frames, strict=True) if spec.dtype == "int32"]
    ids = [token for frame in ints for token in token_ids_of_frame(frame)]
    if not all(np.isfinite(one).all() for one in embedding_sums(step, frames)):
        return "hidden states that are not finite"
    strange = [token for token in ids if not 0 <= token < model.defaults.vocab_size]
    if width is not None and not all(-1e9 <= x <= 1e-3 for x in floats_of_frame(frames[1])):
        return "log-probabilities out of range"
    return f"token id {strange[0]} is not in the vocabulary" if strange else ""


def embedding_sums(step: Step, frames: Sequence[Frame]) -> list[FloatVector]:
    """Return the sums of hidden states in a right result of the last stage, one per such slice."""
    if not step.num_embeds:
        return []
    return list(np.frombuffer(frames[-1], dtype="<f4").reshape(step.num_embeds, -1))


def wrong_activations(step: Step, specs: Sequence[TensorSpec], model: ServedModel) -> str:
    """Return what is wrong with the result of another stage, or an empty text."""
    wanted = TensorSpec(model.wire_dtype, (len(step.token_ids), model.width(source=step.is_source)))
    return "" if tuple(specs) == (wanted,) else f"activations {_text(specs)}, expected {wanted}"


def token_logprobs(
    step: Step, specs: Sequence[TensorSpec], frames: Sequence[Frame]
) -> list[TokenLogprobs | None]:
    """Return the log-probabilities in a right result of the last stage.

    Returns:
        One for each answer that gets a token; None for those whose requests did not ask. The
        tensors are as wide as the largest number asked for, and are cut to what each asked for.
    """
    samplers = step.samplers
    if len(frames) < 3:
        return [None] * len(samplers)
    width = specs[1].shape[1]
    values, ids = floats_of_frame(frames[1]), token_ids_of_frame(frames[2])
    logprobs: list[TokenLogprobs | None] = []
    for row, answer in enumerate(samplers):
        number = answer.sampling.logprobs
        if number is None:
            logprobs.append(None)
            continue
        at = row * width
        top = zip(ids[at + 1 : at + 1 + number], values[at + 1 : at + 1 + number], strict=True)
        logprobs.append(TokenLogprobs(logprob=values[at], top=tuple(top)))
    return logprobs


def _num_logprobs(step: Step) -> int | None:
    """Return how many likeliest tokens the last stage reports; None for no log-probabilities."""
    numbers = [answer.sampling.logprobs for answer in step.samplers]
    return max((number for number in numbers if number is not None), default=None)


def _text(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "none"
