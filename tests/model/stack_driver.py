"""Drives stages of encoder-decoders as the coordinator does: sources first, then answers."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import encoder_layers
from distributed_llm.common.messages import SequenceSlice, SharedPrefix
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.step_results import StageOutput

CPU = torch.device("cpu")
Part = tuple[int, int, int]
"""Number of a text, and the positions of its answer that a step computes: [start, stop)."""


class StackPipeline:
    """Stages of an encoder-decoder, and the texts that are generated with them.

    Args:
        checkpoint: of the model.
        cuts: layers before which stages begin, but the first.
        dtype: of the stages.
        quantize: what matrices of layers become.

    Attributes:
        latest: what the last stage gave in the latest step.
        sources: of the texts; sequence ids are their indices, counted from 1.
        answers: of the texts, with their start tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cuts: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float32,
        quantize: Quantize = "none",
    ) -> None:
        edges = [0, *cuts, checkpoint.num_layers]
        self.stages = [
            Stage.load(
                checkpoint, LayerRange(start, stop), device=CPU, dtype=dtype, quantize=quantize
            )
            for start, stop in pairwise(edges)
        ]
        self._dtype = dtype
        self.latest = StageOutput()
        self.encoders = encoder_layers(checkpoint.config)
        self.sources: list[list[int]] = []
        self.answers: list[list[int]] = []

    @property
    def decoding(self) -> list[Stage]:
        """The stages that a target step passes."""
        return [stage for stage in self.stages if stage.layers.stop > self.encoders]

    def read(self, sources: Sequence[Sequence[int]], start: Sequence[int]) -> None:
        """Add texts with these sources, and run the step that reads them."""
        first = len(self.sources)
        self.sources += map(list, sources)
        self.answers += [list(start) for _ in sources]
        self.read_again(range(first, len(self.sources)))

    def read_again(self, numbers: Sequence[int]) -> None:
        """Run the step that reads the sources of some texts."""
        parts = [
            SequenceSlice(
                sequence_id=SequenceId(number + 1),
                start=0,
                num_tokens=len(self.sources[number]),
                source=len(self.sources[number]),
            )
            for number in numbers
        ]
        self._pass(self.stages, parts, [t for number in numbers for t in self.sources[number]])

    def share(self, number: int, length: int) -> int:
        """Add a text that begins as another's source and `length` of its answer; return which."""
        self.sources.append(self.sources[number])
        self.answers.append(self.answers[number][:length])
        self._prefix = SharedPrefix(
            sequence_id=SequenceId(number + 1), length=len(self.sources[number]) + length - 1
        )
        return len(self.sources) - 1

    def step(
        self, parts: Sequence[Part], sampling: Sampling, child: int | None = None
    ) -> list[int]:
        """Run a step of these parts of answers; return the tokens after each.

        Args:
            parts: of the answers.
            sampling: of all of them.
            child: the text that was made by `share` and begins in this step.
        """
        slices, tokens = [], []
        for number, start, stop in parts:
            source = len(self.sources[number])
            part = SequenceSlice(
                sequence_id=SequenceId(number + 1),
                start=source + start,
                num_tokens=stop - start,
                source=source,
                sample=True,
                sampling=sampling,
            )
            if number == child:
                part = msgspec.structs.replace(part, prefix=self._prefix)
            slices.append(part)
            tokens += self.answers[number][start:stop]
        output = self._pass(self.decoding, slices, tokens)
        assert output.token_ids is not None
        return [int(token) for token in output.token_ids]

    def _pass(
        self, stages: Sequence[Stage], slices: Sequence[SequenceSlice], tokens: Sequence[int]
    ) -> StageOutput:
        hidden_states, output = None, StageOutput()
        for stage in stages:
            output = stage.run(slices, torch.tensor(tokens, dtype=torch.int32), hidden_states)
            hidden_states = output.hidden_states
            assert hidden_states is None or hidden_states.dtype == self._dtype
        self.latest = output
        return output
