"""Blocks of RWKV go on from a state: the reference, transformers' own, computes all at once."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model.rwkv_blocks import use_layers_with_caches
from distributed_llm.worker.model.state_layers import MixerCache
from tests.checkpoints import HIDDEN_SIZE, VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import load_stages

LAYERS = 4
STATES = torch.randn((2, 9, HIDDEN_SIZE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keys", [1, 3000])
@pytest.mark.parametrize("stops", [(1, 2, 3, 9), (2, 7, 8, 9), (6, 9)], ids=str)
def test_chunks_of_two_texts_give_what_transformers_makes_of_each(
    stops: tuple[int, ...], keys: float
) -> None:
    """With matrices that it divides by 2, halved hidden states behind, and large keys."""
    settings: dict[str, Any] = {"num_layers": LAYERS, "rescale_every": 2, "seed": 1}
    whole: Any = build_model("rwkv", **settings)
    ours: Any = build_model("rwkv", **settings)
    use_layers_with_caches(ours)
    block, outputs, made = ours.rwkv.blocks[3], [], None
    with torch.inference_mode():
        for model in (whole, ours):
            model.rwkv.blocks[3].attention.key.weight.mul_(keys)
        whole(torch.tensor([[1]]))  # divides its matrices
        expected = whole.rwkv.blocks[3](STATES)[0] / 2
        for start, stop in pairwise((0, *stops)):
            cache = MixerCache(made)
            outputs.append(block(STATES[:, start:stop], past_key_values=cache)[0])
            made = cache.made
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every", [1, 3, 0])
def test_stages_halve_by_the_numbers_of_their_layers(tmp_path: Path, every: int) -> None:
    folder = make_checkpoint(tmp_path, "rwkv", num_layers=LAYERS, rescale_every=every)
    whole = build_model("rwkv", num_layers=LAYERS, rescale_every=every)
    tokens = torch.randint(VOCAB_SIZE, (7,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = whole(tokens[None], output_hidden_states=True).hidden_states
    part = SequenceSlice(sequence_id=SequenceId(0), start=0, num_tokens=7)
    first, middle, _ = load_stages(open_checkpoint(folder), [1, 2, 1])
    states = first.run([part], tokens.int(), None).hidden_states
    torch.testing.assert_close(states, expected[0][0])
    states = middle.run([part], tokens.int(), states).hidden_states
    torch.testing.assert_close(states, expected[2][0])


def test_stages_take_what_is_planned(tmp_path: Path) -> None:
    """The last one has no embedding, though its head is called like none else."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "rwkv", num_layers=LAYERS))
    cost = model_cost(checkpoint, "float32")
    for stage in load_stages(checkpoint, [1, 2, 1]):
        assert stage.weight_bytes == cost.weight_bytes(stage.layers)
