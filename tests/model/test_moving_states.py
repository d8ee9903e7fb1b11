"""Layers with a state of their own move between workers while sequences are generated."""

from pathlib import Path
from typing import Any

import pytest

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.manifest import KVTransferError
from tests.checkpoints import make_checkpoint
from tests.model.test_moving_stages import PENALTY, PLANS, PROMPTS, Move, MovingPipeline
from tests.reference import check_varied, reference_ids

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "lfm2": {},
    "falcon_h1": {},
    "mamba2": {},
    "nemotron_h": {
        "layers_block_type": [
            "linear_attention",
            "full_attention",
            "moe",
            "mlp",
            "linear_attention",
            "full_attention",
        ]
    },
}
"""Beside keys and values, in layers of their own; alone; and a stage that keeps nothing."""

NAMES = ("all borders move", "all at once on a new worker")
ANSWER = 8


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=6, **FAMILIES[request.param])


def begin(folder: Path) -> MovingPipeline:
    """Three texts: two that answer, and one within its prompt."""
    pipeline = MovingPipeline(open_checkpoint(folder))
    pipeline.prefill(PROMPTS[:3], [0, 0, 0])
    pipeline.run([(0, 0, 40), (2, 0, 13)], None, snapshot=True)
    pipeline.run([(0, 40, 74), (1, 0, 8)], None, snapshot=True)
    for _ in range(2):
        pipeline.decode(PENALTY, [0, 1])
    return pipeline


def go_on(pipeline: MovingPipeline, move: Move) -> None:
    """Steps of every kind, with chunks exported between them; the last step is abandoned."""
    move.pump(3000, 3)
    child = pipeline.share(0, 40, [5, 6, 7])
    pipeline.decode(PENALTY, [0, 1, child])
    move.pump(3000, 3)
    pipeline.abandon([(n, pipeline.done[n], len(pipeline.texts[n])) for n in (0, 1, child)], 1)
    pipeline.run([(2, 13, 20)], None, snapshot=True)
    pipeline.run([(2, 20, 25)], None)
    move.pump(3000)
    turn = pipeline.share(2, 20, [1, 2, 3], take=True)
    pipeline.decode(PENALTY, [1, turn, 0, child])
    pipeline.run([(0, 74, 76), (child, 40, 43)], None)  # again, from snapshots
    move.pump(3000)
    pipeline.abandon([(1, pipeline.done[1], len(pipeline.texts[1]))], 1)


def finish(folder: Path, pipeline: MovingPipeline) -> None:
    """Let all texts answer that are left, and a new one that goes on from an old snapshot."""
    pipeline.share(0, 74, [9, 9])
    prompts = {
        0: PROMPTS[0],
        1: PROMPTS[1],
        3: [*PROMPTS[0][:40], 5, 6, 7],
        4: [*PROMPTS[2][:20], 1, 2, 3],
        5: [*PROMPTS[0][:74], 9, 9],
    }
    left = list(prompts)
    while left:
        pipeline.decode(PENALTY, left)
        left = [n for n in left if len(pipeline.texts[n]) < len(prompts[n]) + ANSWER]
    for number, prompt in prompts.items():
        expected = reference_ids(folder, prompt, ANSWER, repetition_penalty=3.0)
        assert pipeline.texts[number] == prompt + expected
        check_varied(expected)
    pipeline.release(*range(6))
    assert all(stage.kv_bytes == 0 for stage in pipeline.stages)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_as_if_nothing_had_moved(folder: Path, name: str) -> None:
    pipeline = begin(folder)
    move = pipeline.begin_to_move(PLANS[name])
    go_on(pipeline, move)
    set_back = {SequenceId(1)}
    move.pump(3000, rest=set_back)
    pipeline.end_to_move(move, set_back)
    finish(folder, pipeline)


@pytest.mark.parametrize("folder", ["falcon_h1"], indirect=True)
def test_what_is_not_complete_is_not_assembled(folder: Path) -> None:
    """Keys and values are here, and states are not: nothing was changed, and the rest may come."""
    pipeline = begin(folder)
    move = pipeline.begin_to_move(PLANS["all borders move"])
    go_on(pipeline, move)
    set_back = {SequenceId(1)}
    move.pump(3000)
    with pytest.raises(KVTransferError, match="lack state"):
        move.assemble_kv("b", set_back)
    assert move.new["b"].kv_bytes == 0
    move.pump(3000, rest=set_back)
    pipeline.end_to_move(move, set_back)
    finish(folder, pipeline)
