"""Runs one task on a stage: decodes its tensors from frames, and encodes the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import Task
from distributed_llm.common.tensors import DtypeName, Frame, TensorSpec
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput
from distributed_llm.worker.tensor_frames import TORCH_DTYPES, frame_of, tensor_of

TensorsOnWire = tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]


def compute(
    stage: Stage, task: Task, frames: Sequence[Frame], wire_dtype: DtypeName
) -> TensorsOnWire:
    """Run a task and return its result as specs and frames.

    Args:
        stage: its KV cache frees what the task names and gains the computed positions.
        task: as received.
        frames: of the task's tensors.
        wire_dtype: of the hidden states that are returned.

    Raises:
        StageError: the task has other tensors than it should, or as `Stage.run` says.
    """
    stage.release(task.released)
    stage.forget({one.sequence_id: one.position for one in task.seen_from})
    tensors = [tensor_of(spec, frame) for spec, frame in zip(task.tensors, frames, strict=True)]
    masks = tensors.pop().numpy() if task.num_masks and tensors else None
    if not 1 <= len(tensors) <= 2 or tensors[0].dtype != torch.int32:
        raise StageError("The task's tensors are not token ids, hidden states and masks.")
    hidden_states = tensors[1] if len(tensors) == 2 else None
    output = stage.run(task.sequences, tensors[0], hidden_states, masks)
    given = [frame_of(tensor) for tensor in _tensors_of(output, wire_dtype)]
    return tuple(spec for spec, _ in given), tuple(frame for _, frame in given)


def _tensors_of(output: StageOutput, wire_dtype: DtypeName) -> list[Tensor]:
    """Return the tensors of a `TaskResult`: hidden states, or what the last stage has found."""
    if output.hidden_states is not None:
        return [output.hidden_states.to(TORCH_DTYPES[wire_dtype])]
    sampled = output.token_ids is not None and output.token_ids.numel() > 0
    tokens = (output.token_ids, output.logprobs, output.logprob_ids) if sampled else ()
    return [tensor for tensor in (*tokens, output.sums) if tensor is not None]
