"""Sums of last hidden states: their mean is that of transformers' `AutoModel`, however split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.model.failures import SequencesFailed
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import GREEDY, load_stages

NUM_LAYERS = 3
CHUNK = 9
EMBED, ANSWER = range(3), 3
"""Numbers of the texts that are embedded, and of the one that is answered in the same steps."""

_draw = torch.Generator().manual_seed(3)
TEXTS = {
    n: torch.randint(VOCAB_SIZE, (size,), generator=_draw).tolist()
    for n, size in enumerate((23, 1, 12))
}
TEXTS[ANSWER] = TEXTS[2]
ALONE = 4
TEXTS[ALONE] = TEXTS[2]


def slice_of(number: int, start: int, stop: int) -> SequenceSlice:
    answered = number not in EMBED
    return SequenceSlice(
        sequence_id=SequenceId(number),
        start=start,
        num_tokens=stop - start,
        embed=not answered,
        sample=answered and stop == len(TEXTS[number]),
        sampling=GREEDY if answered else None,
    )


def run(
    stages: list[Stage], parts: Sequence[SequenceSlice]
) -> tuple[list[int], Mapping[int, Tensor]]:
    """Run one step; return the tokens that were sampled, and the sums by text."""
    tokens = [t for p in parts for t in TEXTS[p.sequence_id][p.start : p.start + p.num_tokens]]
    token_ids, hidden = torch.tensor(tokens, dtype=torch.int32), None
    for stage in stages:
        output = stage.run(parts, token_ids, hidden)
        hidden = output.hidden_states
    assert output.token_ids is not None
    embedded = [part.sequence_id for part in parts if part.embed]
    if output.sums is None:
        assert not embedded
        return output.token_ids.tolist(), {}
    return output.token_ids.tolist(), dict(zip(embedded, output.sums, strict=True))


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("llama", [1, 1, 1]),
        ("gpt2", [1, 2]),
        ("gemma2", [3]),
        ("gemma2", [2, 1]),
        ("gpt_neox", [1, 2]),
    ],
)
def test_means_are_those_of_transformers_beside_answers(
    tmp_path: Path, family: str, split: list[int]
) -> None:
    folder = make_checkpoint(tmp_path, family, num_layers=NUM_LAYERS)
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32)
    stages = load_stages(open_checkpoint(folder), split)
    sums = {number: np.zeros(whole.config.hidden_size) for number in EMBED}
    answers = []
    for at in range(0, 23, CHUNK):
        tokens, found = run(
            stages,
            [
                slice_of(number, at, min(at + CHUNK, len(TEXTS[number])))
                for number in (*EMBED, ANSWER)
                if len(TEXTS[number]) > at
            ],
        )
        answers += tokens
        for number, row in found.items():
            sums[number] += row.numpy()
    for number, total in sums.items():
        text = TEXTS[number]
        with torch.inference_mode():
            expected = whole(torch.tensor([text])).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(total / len(text), expected, rtol=1e-4, atol=1e-5)
    assert run(stages, [slice_of(ALONE, 0, 12)]) == (answers, {})


def test_a_model_whose_last_hidden_states_are_of_another_size_is_told(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt", num_layers=1)
    stages = load_stages(open_checkpoint(folder), [1])
    with pytest.raises(SequencesFailed, match="no embeddings") as caught:
        run(stages, [slice_of(0, 0, 3), slice_of(ALONE, 0, 12)])
    assert isinstance(caught.value.cause, InvalidRequest)
    assert caught.value.sequence_ids == (0,)
