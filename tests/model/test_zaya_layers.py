"""Layers of ZAYA go on from a state: the reference, transformers' own, computes all at once."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.state_layers import MixerCache
from distributed_llm.worker.model.zaya_layers import replace_zaya_projections
from tests.checkpoints import HIDDEN_SIZE, VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, load_stages

STATES = torch.randn((2, 9, HIDDEN_SIZE), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(VOCAB_SIZE, (9,), generator=torch.Generator().manual_seed(2)).int()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stops", [(1, 2, 3, 9), (2, 7, 8, 9), (6, 9)], ids=str)
def test_chunks_give_what_transformers_makes_of_the_whole(
    stops: tuple[int, ...], bias: bool
) -> None:
    """A delayed value before the first token is what is made of zeros: a bias, if there is one."""
    model: Any = build_model("zaya", num_layers=1, attention_bias=bias)
    layer = model.model.layers[0]
    with torch.inference_mode():
        made = layer.self_attn.qkv_proj(STATES, None)
        expected = torch.cat([each.flatten(2) for each in made], dim=-1)
        replace_zaya_projections(layer)
        ours, outputs, states = layer.self_attn.qkv_proj.together, [], None
        for start, stop in pairwise((0, *stops)):
            cache = MixerCache(states)
            outputs.append(ours(STATES[:, start:stop], past_key_values=cache))
            states = cache.made
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_router_states_reach_the_next_stage_beside_hidden_states(tmp_path: Path) -> None:
    """Also where a stage shares its layers with another one."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "zaya", num_layers=3))
    whole: Any = build_model("zaya", num_layers=3)
    told: list[Any] = []
    layer = whole.model.layers[1]
    layer.register_forward_hook(lambda *args: told.append(args[-1]))
    with torch.inference_mode():
        whole(TOKENS[None].long(), use_cache=False)
    expected = torch.cat(told[0], dim=-1)[0]
    part = SequenceSlice(sequence_id=SequenceId(0), start=0, num_tokens=9)
    first, second, _ = load_stages(checkpoint, [1, 1, 1])
    states = first.run([part], TOKENS, None).hidden_states
    states = second.run([part], TOKENS, states).hidden_states
    assert checkpoint.hidden_size == HIDDEN_SIZE + 12
    torch.testing.assert_close(states, expected)
    settings: Any = {"device": CPU, "dtype": torch.float32}
    both = Stage.load(checkpoint, LayerRange(0, 2), donor=second, **settings)
    torch.testing.assert_close(both.run([part], TOKENS, None).hidden_states, expected)
    torch.testing.assert_close(
        second.run([part], TOKENS, first.run([part], TOKENS, None).hidden_states).hidden_states,
        expected,
    )
