"""Drives stages as the coordinator does: packs sequences, passes hidden states on."""

from collections.abc import Sequence

import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.stage import Stage

CPU = torch.device("cpu")
GREEDY = Sampling()
Chunk = tuple[int, int, int]
"""Sequence id, first position, position after the last."""


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

    def run(self, chunks: Sequence[Chunk], sampling: Sampling | None = GREEDY) -> list[int]:
        """Run one step of these chunks of the texts; return the tokens that follow them."""
        sequences = [
            SequenceSlice(
                sequence_id=number,
                start=start,
                num_tokens=stop - start,
                sampling=sampling,
            )
            for number, start, stop in chunks
        ]
        tokens = [t for number, start, stop in chunks for t in self.texts[number][start:stop]]
        token_ids, hidden_states = torch.tensor(tokens, dtype=torch.int32), None
        for stage in self.stages:
            output = stage.run(sequences, token_ids, hidden_states)
            hidden_states = output.hidden_states
        for number, _, stop in chunks:
            self.done[number] = stop
        assert output.token_ids is not None
        return [int(token) for token in output.token_ids]

    def prefill(self, prompts: Sequence[Sequence[int]], stops: Sequence[int]) -> None:
        """Start these texts and compute the first positions of each, without sampling."""
        self.texts = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        if any(stops):
            self.run([(i, 0, stop) for i, stop in enumerate(stops) if stop], sampling=None)

    def decode(self, sampling: Sampling = GREEDY) -> list[int]:
        """Compute what is left of each text, and add a token to it."""
        chunks = [(i, self.done[i], len(text)) for i, text in enumerate(self.texts)]
        tokens = self.run(chunks, sampling)
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
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
