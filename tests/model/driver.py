"""Drives stages as the coordinator does: packs sequences, passes hidden states on."""

from collections.abc import Sequence

import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.messages import SequenceSlice, SharedPrefix
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model.stage import Stage

CPU = torch.device("cpu")
GREEDY = Sampling()
Chunk = tuple[int, int, int]
"""Positions that a step computes of a sequence: sequence id, first position, end (exclusive)."""


def load_stages(
    checkpoint: Checkpoint, split: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Stage]:
    """Return stages of `split[i]` layers each."""
    stages, start = [], 0
    for count in split:
        layers = LayerRange(start, start + count)
        stages.append(Stage.load(checkpoint, layers, device=CPU, dtype=dtype))
        start += count
    assert start == checkpoint.num_layers
    return stages


class Pipeline:
    """Stages, and the texts that are generated with them; sequence ids are indices of texts."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.texts: list[list[int]] = []
        self.done: list[int] = []
        self.prefixes: dict[int, SharedPrefix] = {}

    def run(
        self,
        chunks: Sequence[Chunk],
        sampling: Sampling | None = GREEDY,
        *,
        snapshot: bool = False,
    ) -> list[int]:
        """Run one step of these chunks of the texts; return the tokens that follow them."""
        sequences = [self._slice(*chunk, sampling, snapshot) for chunk in chunks]
        tokens = [t for number, start, stop in chunks for t in self.texts[number][start:stop]]
        token_ids, hidden_states = torch.tensor(tokens, dtype=torch.int32), None
        for stage in self.stages:
            output = stage.run(sequences, token_ids, hidden_states)
            hidden_states = output.hidden_states
        for number, _, stop in chunks:
            self.done[number] = stop
        assert output.token_ids is not None
        return [int(token) for token in output.token_ids]

    def _slice(
        self, number: int, start: int, stop: int, sampling: Sampling | None, snapshot: bool
    ) -> SequenceSlice:
        prefix = self.prefixes.get(number)
        return SequenceSlice(
            sequence_id=SequenceId(number),
            start=start,
            num_tokens=stop - start,
            sample=sampling is not None,
            sampling=sampling,
            prefix=prefix if prefix and prefix.length == start else None,
            snapshot=snapshot,
        )

    def share(self, parent: int, length: int, rest: Sequence[int], *, take: bool = False) -> int:
        """Add a text that begins as the first `length` positions of another; return its number."""
        number = len(self.texts)
        self.texts.append([*self.texts[parent][:length], *rest])
        self.done.append(length)
        self.prefixes[number] = SharedPrefix(
            sequence_id=SequenceId(parent), length=length, take=take
        )
        return number

    def release(self, *numbers: int) -> None:
        """Release these texts on every stage."""
        for stage in self.stages:
            stage.release(map(SequenceId, numbers))

    def prefill(self, prompts: Sequence[Sequence[int]], stops: Sequence[int]) -> None:
        """Start these texts and compute the first positions of each, without sampling."""
        self.texts = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        if any(stops):
            self.run([(i, 0, stop) for i, stop in enumerate(stops) if stop], sampling=None)

    def decode(
        self, sampling: Sampling = GREEDY, numbers: Sequence[int] | None = None
    ) -> list[int]:
        """Compute what is left of these texts, default all, and add a token to each."""
        numbers = range(len(self.texts)) if numbers is None else numbers
        chunks = [(i, self.done[i], len(self.texts[i])) for i in numbers]
        tokens = self.run(chunks, sampling)
        for number, token in zip(numbers, tokens, strict=True):
            self.texts[number].append(token)
        return tokens

    def next_chunks(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[Chunk]:
        """Return the next `sizes[i]` tokens of each prompt that has some left."""
        if not self.texts:
            self.texts, self.done = [list(prompt) for prompt in prompts], [0] * len(prompts)
        return [
            (i, self.done[i], min(self.done[i] + size, len(self.texts[i])))
            for i, size in enumerate(sizes)
            if self.done[i] < len(self.texts[i])
        ]
