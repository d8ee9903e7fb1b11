"""What a stage gives, bit by bit: to compare it with what it gives at another time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput
from tests.checkpoints import HIDDEN_SIZE

TOKENS = torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32)


def answer(stage: Stage, sequence_id: int = 0) -> list[Tensor]:
    """Return what the stage gives for five tokens and for one more, and forget them."""
    outputs = []
    for start, stop in ((0, 4), (4, 5)):
        part = SequenceSlice(
            sequence_id=SequenceId(sequence_id),
            start=start,
            num_tokens=stop - start,
            sample=True,
            sampling=Sampling(logprobs=20),
        )
        generator = torch.Generator().manual_seed(start)
        shape = (stop - start, HIDDEN_SIZE)
        hidden = torch.randn(shape, generator=generator, dtype=torch.float32)
        given = None if stage.layers.start == 0 else hidden
        outputs += tensors_of(stage.run([part], TOKENS[start:stop], given))
    stage.reset()
    return outputs


def tensors_of(output: StageOutput) -> list[Tensor]:
    tensors = (output.hidden_states, output.token_ids, output.logprobs, output.logprob_ids)
    return [tensor for tensor in tensors if tensor is not None]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@contextmanager
def other_default_dtype() -> Iterator[None]:
    """Have torch's default be bfloat16, as it is while another thread builds such a model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
