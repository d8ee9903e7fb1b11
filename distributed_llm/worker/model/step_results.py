"""What a stage gives of a step: hidden states, or tokens and sums; all of them finite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.errors import InvalidRequest, StageError
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.wording import layers_text
from distributed_llm.worker.devices import fetched
from distributed_llm.worker.model.failures import SequencesFailed
from distributed_llm.worker.model.forward import Forward
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep
from distributed_llm.worker.model.sampled_rows import RowToSample, sample_rows
from distributed_llm.worker.model.sampler import RowsFailed
from distributed_llm.worker.model.stacks.forward import StackForward
from distributed_llm.worker.model.task_inputs import Masks


@dataclass(frozen=True)
class StageOutput:
    """The result of one step on a stage.

    Attributes:
        hidden_states: [tokens, hidden_size] in the stage's dtype, on the CPU; None on the last
            stage.
        token_ids: int32 [sequences that sample] on the CPU, in the order of the task; None on all
            other stages.
        logprobs: float32 [sequences that sample, 1 + k] on the CPU: natural logarithms of the
            model's probabilities, before sampling parameters apply, for the sampled token and the k
            likeliest ones, best first. k is the largest number that any of the sequences asked for;
            0.0 for sequences that did not ask. None if none of them asked.
        logprob_ids: int32, of the same shape: the tokens that these belong to.
        sums: float32 [sequences that embed, hidden_size] on the CPU, in the order of the task: of
            the model's last hidden states, after its final norm. None if no sequence embeds.
    """

    hidden_states: Tensor | None = None
    token_ids: Tensor | None = None
    logprobs: Tensor | None = None
    logprob_ids: Tensor | None = None
    sums: Tensor | None = None


class StepResults:
    """Computes steps on one stage.

    Args:
        forward: of the stage.
        layers: of the stage.
        last: whether they are the model's last.
        width: numbers of a hidden state.
        dtype: that is computed in.
    """

    def __init__(
        self,
        forward: Forward | StackForward,
        layers: LayerRange,
        dtype: torch.dtype,
        *,
        last: bool,
        width: int,
    ) -> None:
        self._forward = forward
        self._layers = layers
        self._dtype = dtype
        self._last = last
        self._width = width

    def of(
        self,
        sequences: Sequence[SequenceSlice],
        step: PackedStep,
        token_ids: Tensor,
        hidden_states: Tensor | None,
        masks: Masks | None,
        samplings: Mapping[SequenceId, Sampling],
    ) -> StageOutput:
        """Return what a step gives; appends to the KV cache.

        Args:
            sequences: of the step, as in `Stage.run`.
            step: that is about to be computed.
            token_ids: as in `Stage.run`, like `hidden_states` and `masks`.
            samplings: parameters of the sequences that sample.

        Raises:
            SequencesFailed: the result is not finite for some sequences, or their parameters allow
                no token.
            StageError: the model gave something else than it was asked for.
        """
        if not self._last:
            output = self._forward.run(step, token_ids, hidden_states, [])
            assert output is not None
            output = fetched(output)  # before it is looked at: one wait for the device is enough
            last_rows = [s.row + s.num_tokens - 1 for s in step.slices]
            self._check_finite(output[last_rows], step.slices, "hidden states")
            return StageOutput(hidden_states=output)
        ends = [s for s, part in zip(step.slices, sequences, strict=True) if part.sample]
        rows = [s.row + s.num_tokens - 1 for s in ends]
        pooled = [s for s, part in zip(step.slices, sequences, strict=True) if part.embed]
        spans = [(s.row, s.row + s.num_tokens) for s in pooled]
        logits = self._forward.run(step, token_ids, hidden_states, rows, spans)
        sums = self._sums(pooled) if pooled else None
        if logits is None:
            return StageOutput(token_ids=torch.empty(0, dtype=torch.int32), sums=sums)
        if len(logits) != len(ends):
            raise StageError(f"the model gave {len(logits)} rows of logits for {len(ends)} tokens")
        self._check_finite(logits, ends, "logits")
        rows_of_masks = iter(() if masks is None else masks)
        own = [next(rows_of_masks) if part.masked else None for part in sequences if part.sample]
        rows_to_sample = [
            RowToSample(
                samplings[s.sequence_id],
                s.start + s.num_tokens - s.source,
                step.cache.tokens(s.sequence_id, s.start + s.num_tokens)[s.source :],
                mask,
            )
            for s, mask in zip(ends, own, strict=True)
        ]
        try:
            sampled = sample_rows(logits, rows_to_sample)
        except RowsFailed as exc:
            named = [ends[row].sequence_id for row in exc.rows]
            raise SequencesFailed(named, exc.error) from exc
        return StageOutput(**sampled._asdict(), sums=sums)

    def _sums(self, slices: Sequence[PackedSlice]) -> Tensor:
        """Return the sums of hidden states that the latest pass has made."""
        sums = self._forward.sums.take()
        width = self._width
        if sums is None or sums.shape != (len(slices), width):
            why = (
                "This model has no embeddings: its last hidden states are not of the size that its "
                f"layers have ({width}). Use another one."
            )
            raise SequencesFailed([s.sequence_id for s in slices], InvalidRequest(why))
        self._check_finite(sums, slices, "last hidden states")
        return sums.cpu()

    def _check_finite(self, values: Tensor, slices: Sequence[PackedSlice], what: str) -> None:
        # The extremes of a tensor with a NaN are NaN; argmax would return some token for it.
        lowest, highest = torch.aminmax(values)
        if bool(torch.isfinite(lowest) & torch.isfinite(highest)):
            return
        finite = torch.isfinite(values).all(dim=-1).tolist()
        named = [s.sequence_id for s, well in zip(slices, finite, strict=True) if not well]
        cause, remedy = "the model's files are", "Compare the files with the original"
        if self._dtype != torch.float32:
            cause = f"{cause}, or {self._dtype} is too narrow for it"
            remedy = f"{remedy}, serve it with --dtype float32"
        why = (
            f"the {what} after {layers_text(self._layers)} are not finite: the weights on this "
            f"machine are damaged, or {cause}. {remedy}, or serve it without this machine."
        )
        raise SequencesFailed(named, StageError(why))
