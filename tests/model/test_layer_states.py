"""Layers with a state of their own: steps go on from where a state stands, and only from there.

The reference is transformers alone: a whole forward of each text by itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.messages import MissingPositions
from distributed_llm.common.types import SequenceId
from distributed_llm.worker.kv.cache import KVCacheFull
from distributed_llm.worker.model.failures import MissingPositionsError
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.driver import Pipeline, load_stages

TEXT = torch.randint(VOCAB_SIZE, (24,), generator=torch.Generator().manual_seed(3)).tolist()
OTHER = torch.randint(VOCAB_SIZE, (24,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module", params=["qwen3_5_text", "falcon_h1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def loaded(checkpoint: Checkpoint) -> list[Stage]:
    return load_stages(checkpoint, [1, 3])


@pytest.fixture
def pipeline(loaded: list[Stage]) -> Iterator[Pipeline]:
    """Return stages that hold nothing, with TEXT and OTHER to compute."""
    made = Pipeline(loaded)
    made.texts, made.done = [list(TEXT), list(OTHER)], [0, 0]
    yield made
    for stage in loaded:
        stage.reset()
        stage.limit_kv(1 << 30)


def following(whole: Any, text: list[int]) -> int:
    """Return the likeliest token after a text."""
    with torch.inference_mode():
        logits = whole(input_ids=torch.tensor([text]), use_cache=False).logits
    return int(logits[0, -1].argmax())


def missing(pipeline: Pipeline, number: int, start: int, stop: int) -> int:
    """Return which position the stages answer with when a step cannot go on from `start`."""
    have = set()
    for stage in pipeline.stages:
        with pytest.raises(MissingPositionsError) as caught:
            stage.run(
                [pipeline._slice(number, start, stop, None, snapshot=False)],
                torch.tensor(pipeline.texts[number][start:stop], dtype=torch.int32),
                None if stage.layers.start == 0 else torch.zeros(stop - start, 32),
            )
        (told,) = caught.value.missing
        assert isinstance(told, MissingPositions)
        have.add(told.have)
    (position,) = have
    return position


def test_a_step_that_is_sent_twice_gives_the_same(pipeline: Pipeline, whole: Any) -> None:
    for start, stop in ((0, 7), (7, 12), (12, 13), (13, 14)):
        for _ in range(2):
            assert pipeline.run([(0, start, stop)]) == [following(whole, TEXT[:stop])]


def test_a_step_that_failed_half_way_changes_nothing(pipeline: Pipeline, whole: Any) -> None:
    pipeline.run([(0, 0, 9), (1, 0, 5)])
    last = pipeline.stages[-1]
    left = [2]

    def fail() -> None:
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError

    for chunks in ([(0, 9, 14), (1, 5, 6)], [(0, 14, 15), (1, 6, 7)]):
        last.progress, left[0] = fail, 2
        with pytest.raises(ZeroDivisionError):
            pipeline.run(chunks)
        last.progress = None
        expected = [
            following(whole, text[:stop])
            for text, (_, _, stop) in zip((TEXT, OTHER), chunks, strict=True)
        ]
        assert pipeline.run(chunks) == expected


def test_a_sequence_is_set_back_to_a_snapshot(pipeline: Pipeline, whole: Any) -> None:
    pipeline.run([(0, 0, 10)], snapshot=True)
    for stop in range(11, 15):
        pipeline.run([(0, stop - 1, stop)])
    pipeline.texts[0] = TEXT[:10] + OTHER[10:]
    assert missing(pipeline, 0, 12, 16) == 10
    assert pipeline.run([(0, 10, 16)]) == [following(whole, pipeline.texts[0][:16])]
    assert missing(pipeline, 0, 14, 15) == 10
    assert pipeline.run([(0, 16, 17)]) == [following(whole, pipeline.texts[0][:17])]


def test_only_where_a_state_stands_computing_goes_on(pipeline: Pipeline) -> None:
    for start, stop in ((0, 4), (4, 6), (6, 9)):
        pipeline.run([(0, start, stop)], snapshot=stop == 4)
    assert missing(pipeline, 0, 8, 12) == 6
    assert missing(pipeline, 0, 5, 12) == 4
    assert missing(pipeline, 0, 12, 13) == 9
    pipeline.run([(0, 9, 10)])
    assert missing(pipeline, 0, 8, 12) == 4
    pipeline.run([(0, 0, 3)])
    assert missing(pipeline, 0, 4, 6) == 3
    pipeline.run([(0, 3, 8)])
    assert missing(pipeline, 0, 4, 6) == 3


def test_children_begin_with_a_snapshot_of_their_parent(pipeline: Pipeline, whole: Any) -> None:
    pipeline.run([(0, 0, 6)], snapshot=True)
    pipeline.run([(0, 6, 11)])
    held = sum(stage.kv_bytes for stage in pipeline.stages)
    first, second = pipeline.share(0, 6, OTHER[:6]), pipeline.share(0, 6, OTHER[6:12], take=True)
    none = pipeline.share(0, 8, OTHER)
    assert missing(pipeline, none, 8, 9) == 0
    texts = pipeline.texts
    assert pipeline.run([(first, 6, 8), (0, 11, 12)]) == [
        following(whole, texts[first][:8]),
        following(whole, TEXT[:12]),
    ]
    assert pipeline.run([(second, 6, 7), (first, 8, 9)]) == [
        following(whole, texts[second][:7]),
        following(whole, texts[first][:9]),
    ]
    pipeline.texts[first] = texts[first][:6] + TEXT[6:10]
    assert pipeline.run([(first, 6, 10)]) == [following(whole, texts[first])]
    pipeline.release(first, second)
    assert held > 0 == sum(stage.kv_bytes for stage in pipeline.stages)


def test_states_count_towards_the_limit(pipeline: Pipeline, whole: Any) -> None:
    pipeline.run([(0, 0, 9)], snapshot=True)
    stage = pipeline.stages[0]
    block = 64 * stage.kv_bytes_per_token
    assert stage.kv_bytes == stage.state_bytes + block
    stage.limit_kv(2 * block + 3 * stage.state_bytes)
    pipeline.run([(0, 9, 10)])
    pipeline.run([(0, 10, 11)])
    with pytest.raises(KVCacheFull):
        pipeline.run([(0, 11, 12), (1, 0, 2)])
    assert pipeline.run([(0, 11, 12)]) == [following(whole, TEXT[:12])]
    assert stage.kv_bytes == 3 * stage.state_bytes + block
    pipeline.release(0)
    assert pipeline.run([(1, 0, 2)]) == [following(whole, OTHER[:2])]


def test_what_one_step_made_is_freed_though_some_of_it_is_held(pipeline: Pipeline) -> None:
    pipeline.texts, pipeline.done = [list(TEXT)] * 8, [0] * 8
    pipeline.run([(number, 0, 1) for number in range(8)])
    pipeline.run([(number, 1, 2) for number in range(8)])
    stage = pipeline.stages[0]
    block = 64 * stage.kv_bytes_per_token
    assert stage.kv_bytes == 8 * (2 * stage.state_bytes + block)
    pipeline.release(*range(1, 8))
    assert stage.kv_bytes == 2 * stage.state_bytes + block


def test_what_is_held_beside_others_in_a_batch_is_no_more_than_the_limit(
    pipeline: Pipeline,
) -> None:
    """One of three states of a batch is released: its tensors stay until room is short."""
    pipeline.texts, pipeline.done = [list(TEXT), list(OTHER), list(TEXT[::-1])], [0, 0, 0]
    for stop in (3, 4, 5):
        pipeline.run([(number, pipeline.done[number], stop) for number in range(3)])
        pipeline.done = [stop] * 3
    for stage in pipeline.stages:
        stage.release([SequenceId(0)])
        states = 2 * stage.state_bytes * 2
        positions = stage.kv_bytes - stage._held_sequences._states.nbytes
        assert stage.kv_bytes > positions + states, "the tensors of the third are still there"
        stage.limit_kv(max(positions, 2 * 64 * stage.kv_bytes_per_token) + states)
    pipeline.run([(1, 5, 6), (2, 5, 6)])
    for stage in pipeline.stages:
        assert stage._held_sequences._states.nbytes <= 2 * stage.state_bytes * 2


def test_a_release_leaves_the_states_of_others(pipeline: Pipeline, whole: Any) -> None:
    pipeline.run([(0, 0, 9), (1, 0, 9)], snapshot=True)
    pipeline.release(0)
    new = pipeline.share(1, 9, TEXT[:4])
    assert pipeline.run([(new, 9, 13)]) == [following(whole, pipeline.texts[new])]
