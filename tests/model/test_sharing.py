"""Sequences that share prefixes answer what transformers answers to each of them alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import MissingPositions, SequenceSlice, SharedPrefix
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.worker.kv.cache import KVCacheFull
from distributed_llm.worker.model.failures import MissingPositionsError, ReleasedSequence
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import GREEDY, Pipeline, load_stages
from tests.reference import generated

NUM_LAYERS = 3
PREFIX = torch.randint(VOCAB_SIZE, (70,), generator=torch.Generator().manual_seed(3)).tolist()
RESTS = ([5, 6, 7], [11], [99, 98, 97, 96, 95])
FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "deepseek_v3")
"""One family per kind of attention: plain, windows, caps, sinks, learned positions, latents."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS)


@pytest.fixture
def pipeline(checkpoint: Checkpoint) -> Pipeline:
    """Text 0 begins with PREFIX, and that much of it is computed."""
    made = Pipeline(load_stages(checkpoint, [1, 2]))
    made.prefill([[*PREFIX, *RESTS[0]]], [len(PREFIX)])
    return made


def kv_blocks(stage: Stage) -> float:
    return stage.kv_bytes / (KV_BLOCK * stage.kv_bytes_per_token)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 70])
def test_children_answer_as_if_they_shared_nothing(
    pipeline: Pipeline, whole: Any, length: int
) -> None:
    for rest in RESTS[1:]:
        pipeline.share(0, length, rest)
    prompts = [list(text) for text in pipeline.texts]
    for _ in range(6):
        pipeline.decode()
    for prompt, text in zip(prompts, pipeline.texts, strict=True):
        assert text == prompt + generated(whole, prompt, 6)
    for stage in pipeline.stages:
        assert kv_blocks(stage) == 2 + 2  # the parent's, and a block for each child to go on in


def test_children_go_on_when_the_parent_is_cut_rewritten_and_released(
    pipeline: Pipeline, whole: Any
) -> None:
    child = pipeline.share(0, 66, RESTS[1])
    grandchild = pipeline.share(0, 66, RESTS[1])
    prompt = list(pipeline.texts[child])
    expected = generated(whole, prompt, 8)
    pipeline.decode(numbers=[0, child])
    pipeline.run([(0, 10, 40)], sampling=None)  # the same again, from before what is shared
    pipeline.texts[0][3:60] = [1] * 57
    pipeline.run([(0, 3, 60)], sampling=None)
    pipeline.decode(numbers=[child])
    assert pipeline.texts[0][60:70] == PREFIX[60:70]
    pipeline.decode(numbers=[0, child])
    pipeline.prefixes[grandchild] = SharedPrefix(sequence_id=SequenceId(child), length=66)
    pipeline.decode(numbers=[grandchild])
    pipeline.release(0)
    for _ in range(3):
        pipeline.decode(numbers=[child, grandchild])
    pipeline.release(child)
    for _ in range(4):
        pipeline.decode(numbers=[grandchild])
    assert pipeline.texts[child] == prompt + expected[:6]
    assert pipeline.texts[grandchild] == prompt + expected
    pipeline.release(grandchild)
    assert [stage.kv_bytes for stage in pipeline.stages] == [0, 0]


def test_the_parent_of_a_rewritten_sequence_answers_as_before(
    pipeline: Pipeline, whole: Any
) -> None:
    """A child that is computed again from before where it began does not write to its parent."""
    child = pipeline.share(0, 66, RESTS[1])
    pipeline.decode(numbers=[child])
    pipeline.texts[child] = [*PREFIX[:5], *range(80)]
    prompts = [list(pipeline.texts[0]), list(pipeline.texts[child])]
    pipeline.run([(child, 5, 84)], sampling=None)
    for _ in range(4):
        pipeline.decode()
    for prompt, text in zip(prompts, pipeline.texts, strict=True):
        assert text == prompt + generated(whole, prompt, 4)


def test_turns_of_a_conversation_take_over_the_turn_before(pipeline: Pipeline, whole: Any) -> None:
    turn = 0
    for rest in RESTS:
        pipeline.decode(numbers=[turn])
        pipeline.decode(numbers=[turn])
        turn = pipeline.share(turn, pipeline.done[turn], rest, take=True)
    prompt = list(pipeline.texts[turn])
    for _ in range(4):
        pipeline.decode(numbers=[turn])
    assert pipeline.texts[turn] == prompt + generated(whole, prompt, 4)
    assert [kv_blocks(stage) for stage in pipeline.stages] == [2, 2]
    with pytest.raises(ReleasedSequence):
        pipeline.run([(0, 0, 1)])


def ids(*token_ids: int) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int32)


# ------------------------------------------------------------------ one stage, what it refuses


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    return open_checkpoint(make_checkpoint(folder, num_layers=NUM_LAYERS))


@pytest.fixture
def stage(llama: Checkpoint) -> Stage:
    """Return the whole model as one stage; sequence 0 has positions [0, 70)."""
    made = load_stages(llama, [NUM_LAYERS])[0]
    made.run([piece(0, 0, 70)], ids(*PREFIX), None)
    return made


def piece(
    sequence_id: int,
    start: int,
    num_tokens: int = 1,
    parent: int | None = None,
    *,
    take: bool = False,
) -> SequenceSlice:
    """Return a slice; with `parent`, of a sequence that begins as the first `start` of that."""
    prefix = None
    if parent is not None:
        prefix = SharedPrefix(sequence_id=SequenceId(parent), length=start, take=take)
    return SequenceSlice(
        sequence_id=SequenceId(sequence_id),
        start=start,
        num_tokens=num_tokens,
        sample=True,
        sampling=GREEDY,
        prefix=prefix,
    )


@pytest.mark.parametrize("take", [False, True])
def test_a_sharing_task_run_twice_gives_the_same_and_leaves_the_same(
    stage: Stage, take: bool
) -> None:
    outcomes = []
    for _ in range(3):
        output = stage.run([piece(1, 66, 2, parent=0, take=take)], ids(5, 6), None)
        assert output.token_ids is not None
        lengths = [stage.num_computed_tokens(SequenceId(i)) for i in (0, 1)]
        outcomes.append((output.token_ids.tolist(), stage.kv_bytes, lengths))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][2] == [0 if take else 70, 68]


@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_sharing_task_that_failed_may_be_run_again(
    stage: Stage, llama: Checkpoint, layer: int, take: bool
) -> None:
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == layer + 1:
            raise RuntimeError("the machine failed")

    step = [piece(1, 66, 2, parent=0, take=take)]
    stage.progress = fail
    with pytest.raises(RuntimeError, match="the machine failed"):
        stage.run(step, ids(5, 6), None)
    assert stage.num_computed_tokens(SequenceId(1)) in {0, 66}
    stage.progress = None
    alone = load_stages(llama, [NUM_LAYERS])[0]
    expected = alone.run([piece(1, 0, 68)], ids(*PREFIX[:66], 5, 6), None).token_ids
    token_ids = stage.run(step, ids(5, 6), None).token_ids
    assert expected is not None
    assert token_ids is not None
    assert token_ids.tolist() == expected.tolist()


def test_a_prefix_that_is_not_held_is_missing_and_nothing_is_touched(stage: Stage) -> None:
    held = stage.kv_bytes
    step = [
        piece(1, 66, parent=0, take=True),
        piece(2, 71, parent=0),
        piece(3, 5, parent=9),
        piece(4, 5, parent=1),
    ]
    with pytest.raises(MissingPositionsError) as caught:
        stage.run(step, ids(1, 1, 1, 1), None)
    assert caught.value.missing == tuple(
        MissingPositions(sequence_id=SequenceId(i), have=0) for i in (2, 3, 4)
    )
    assert [stage.num_computed_tokens(SequenceId(i)) for i in range(5)] == [70, 0, 0, 0, 0]
    assert stage.kv_bytes == held


def test_a_known_child_does_not_need_its_prefix(stage: Stage) -> None:
    stage.run([piece(1, 66, 2, parent=0)], ids(5, 6), None)
    stage.release([SequenceId(0)])
    stage.run([piece(1, 66, 2, parent=0)], ids(5, 6), None)
    with pytest.raises(MissingPositionsError) as caught:
        stage.run([piece(1, 69, parent=0)], ids(5), None)
    assert caught.value.missing == (MissingPositions(sequence_id=SequenceId(1), have=68),)


def test_several_children_of_one_step_share_before_the_parent_is_taken_or_cut(
    stage: Stage,
) -> None:
    stage.run([piece(1, 66, parent=0), piece(0, 4), piece(2, 66, parent=0)], ids(5, 7, 5), None)
    assert [stage.num_computed_tokens(SequenceId(i)) for i in range(3)] == [5, 67, 67]
    stage.run([piece(3, 60, parent=1, take=True), piece(4, 60, parent=1)], ids(5, 5), None)
    assert [stage.num_computed_tokens(SequenceId(i)) for i in range(5)] == [5, 0, 67, 61, 61]


def test_a_child_that_does_not_fit_leaves_the_parent(stage: Stage) -> None:
    stage.limit_kv(2 * KV_BLOCK * stage.kv_bytes_per_token)
    for take in (False, True):
        with pytest.raises(KVCacheFull):
            stage.run([piece(1, 66, 63, parent=0, take=take)], ids(*[1] * 63), None)
        assert [stage.num_computed_tokens(SequenceId(i)) for i in (0, 1)] == [70, 0]
    stage.run([piece(1, 66, 62, parent=0, take=True)], ids(*[1] * 62), None)
    assert kv_blocks(stage) == 2


def test_prefixes_that_contradict_their_task_are_refused(stage: Stage) -> None:
    prefix = SharedPrefix(sequence_id=SequenceId(0), length=60)
    wrong_start = SequenceSlice(sequence_id=SequenceId(1), start=66, num_tokens=1, prefix=prefix)
    with pytest.raises(StageError, match="starts at 66, its prefix ends at 60"):
        stage.run([wrong_start], ids(1), None)
    with pytest.raises(StageError, match="sequence 0 is computed and taken at once"):
        stage.run([piece(1, 60, parent=0, take=True), piece(0, 70)], ids(1, 1), None)
    assert [stage.num_computed_tokens(SequenceId(i)) for i in (0, 1)] == [70, 0]
