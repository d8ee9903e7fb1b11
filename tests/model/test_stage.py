"""A stage under repetition, truncation, failure and bad input."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import MissingPositions, SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.stage import MissingPositionsError, Stage
from tests.checkpoints import HIDDEN_SIZE, VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 18], [16, 18, 0, 33, 98]]
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    return open_checkpoint(make_checkpoint(folder, num_layers=NUM_LAYERS))


@pytest.fixture
def pipeline(checkpoint: Checkpoint) -> Pipeline:
    made = Pipeline(load_stages(checkpoint, [1, 1, 1]))
    made.prefill(PROMPTS, [len(prompt) - 1 for prompt in PROMPTS])
    return made


def whole_stage(checkpoint: Checkpoint) -> Stage:
    return load_stages(checkpoint, [NUM_LAYERS])[0]


def piece(start: int, num_tokens: int, sequence_id: int = 0) -> SequenceSlice:
    return SequenceSlice(
        sequence_id=sequence_id, start=start, num_tokens=num_tokens, sampling=Sampling()
    )


def ids(*token_ids: int) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int32)


def test_a_task_run_twice_gives_the_same_and_leaves_the_same(pipeline: Pipeline) -> None:
    chunks = [(i, len(prompt) - 1, len(prompt)) for i, prompt in enumerate(PROMPTS)]
    once = pipeline.run(chunks)
    bytes_once = [stage.kv_bytes for stage in pipeline.stages]
    assert pipeline.run(chunks) == once
    assert [stage.kv_bytes for stage in pipeline.stages] == bytes_once
    again = pipeline.run([(i, 0, len(prompt)) for i, prompt in enumerate(PROMPTS)])
    assert again == once
    for stage in pipeline.stages:
        assert [stage.num_computed_tokens(i) for i in range(3)] == [8, 3, 5]


def test_a_slice_that_starts_earlier_forgets_what_came_after(pipeline: Pipeline) -> None:
    tokens = [pipeline.decode() for _ in range(4)]
    texts = [text[: len(prompt)] for text, prompt in zip(pipeline.texts, PROMPTS, strict=True)]
    # Another continuation, then the first one again: nothing of the other may be left.
    pipeline.texts = [[*text, 77, 78, 79, 80, 81] for text in texts]
    pipeline.run([(i, len(t), len(t) + 5) for i, t in enumerate(texts)])
    pipeline.texts = texts
    pipeline.done = [len(prompt) - 1 for prompt in PROMPTS]
    assert [pipeline.decode() for _ in range(4)] == tokens


def test_sequences_do_not_see_each_other(checkpoint: Checkpoint) -> None:
    together = Pipeline(load_stages(checkpoint, [2, 1]))
    together.prefill(PROMPTS, [0, 0, 0])
    answers = [together.decode() for _ in range(5)]
    for number, prompt in enumerate(PROMPTS):
        alone = Pipeline(load_stages(checkpoint, [2, 1]))
        alone.prefill([prompt], [0])
        assert [alone.decode()[0] for _ in range(5)] == [tokens[number] for tokens in answers]


def test_the_repetition_penalty_counts_prompt_and_answer(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    strong = Sampling(repetition_penalty=100.0)
    pipeline = Pipeline([stage])
    pipeline.prefill(PROMPTS, [4, 2, 0])
    for _ in range(12):
        pipeline.decode(strong)
    for text in pipeline.texts:
        answer = text[-12:]
        assert len(set(answer)) == 12, "a token was repeated in spite of the penalty"
        assert not set(answer) & set(text[:-12])


def test_missing_positions_are_named_before_anything_is_touched(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    stage.run([piece(0, 3)], ids(1, 2, 3), None)
    held = stage.kv_bytes
    slices = [piece(1, 1), piece(4, 1, sequence_id=5), piece(2, 1, sequence_id=9)]
    with pytest.raises(MissingPositionsError) as caught:
        stage.run(slices, ids(1, 2, 3), None)
    assert caught.value.missing == (
        MissingPositions(sequence_id=5, have=0),
        MissingPositions(sequence_id=9, have=0),
    )
    assert stage.num_computed_tokens(0) == 3
    assert stage.kv_bytes == held
    with pytest.raises(MissingPositionsError, match="held are 3 of sequence 0"):
        stage.run([piece(4, 1)], ids(1), None)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_failure_in_a_layer_leaves_the_sequence_as_it_was(
    checkpoint: Checkpoint, layer: int
) -> None:
    stage = whole_stage(checkpoint)
    stage.run([piece(0, 3)], ids(1, 2, 3), None)
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == layer + 1:
            raise RuntimeError("the machine failed")

    stage.progress = fail
    with pytest.raises(RuntimeError, match="the machine failed"):
        stage.run([piece(3, 2), piece(0, 1, sequence_id=1)], ids(4, 5, 6), None)
    assert [stage.num_computed_tokens(i) for i in (0, 1)] == [3, 0]
    stage.progress = None
    output = stage.run([piece(3, 2), piece(0, 1, sequence_id=1)], ids(4, 5, 6), None)
    fresh = whole_stage(checkpoint)
    expected = fresh.run([piece(0, 5), piece(0, 1, sequence_id=1)], ids(1, 2, 3, 4, 5, 6), None)
    assert output.token_ids is not None
    assert expected.token_ids is not None
    assert output.token_ids.tolist() == expected.token_ids.tolist()


def test_progress_is_reported_after_each_layer(pipeline: Pipeline) -> None:
    calls = []
    for number, stage in enumerate(pipeline.stages):
        stage.progress = lambda number=number: calls.append(number)
    pipeline.decode()
    assert calls == [0, 1, 2]


def test_release_gives_the_memory_back(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        assert stage.kv_bytes > 0
        stage.release([0, 2, 12345])
        assert stage.num_computed_tokens(0) == 0
        assert stage.num_computed_tokens(1) == 2
        stage.release([1])
        assert stage.kv_bytes == 0


BAD_INPUT: dict[str, tuple[list[SequenceSlice], torch.Tensor, str]] = {
    "too few tokens": ([piece(0, 3)], ids(1, 2), "2.* token ids for 3 positions"),
    "no sequences": ([], ids(), "token ids for 0 positions"),
    "a sequence twice": ([piece(0, 1), piece(1, 1)], ids(1, 2), "names a sequence twice"),
    "unknown token": ([piece(0, 1)], ids(VOCAB_SIZE), "tokenized for another model"),
    "negative token": ([piece(0, 1)], ids(-1), "tokenized for another model"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_tasks_are_refused(checkpoint: Checkpoint, name: str) -> None:
    slices, tokens, message = BAD_INPUT[name]
    stage = whole_stage(checkpoint)
    with pytest.raises(StageError, match=message):
        stage.run(slices, tokens, None)
    assert stage.kv_bytes == 0


@pytest.mark.parametrize(
    "hidden_states",
    [
        None,
        torch.zeros(2, HIDDEN_SIZE),
        torch.zeros(1, HIDDEN_SIZE + 1),
        torch.zeros(1, HIDDEN_SIZE, dtype=torch.float16),
        torch.zeros(1, 1, HIDDEN_SIZE),
    ],
    ids=["none", "rows", "width", "dtype", "dimensions"],
)
def test_bad_hidden_states_are_refused(checkpoint: Checkpoint, hidden_states: Any) -> None:
    stage = Stage.load(checkpoint, LayerRange(1, 2), device=CPU, dtype=torch.float32)
    with pytest.raises(StageError, match=r"needs torch.float32 of shape \[1, 32\]"):
        stage.run([piece(0, 1)], ids(1), hidden_states)
    first = Stage.load(checkpoint, LayerRange(0, 1), device=CPU, dtype=torch.float32)
    with pytest.raises(StageError, match="first stage was given hidden states"):
        first.run([piece(0, 1)], ids(1), torch.zeros(1, HIDDEN_SIZE))


@pytest.mark.parametrize("damaged", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_comes_from_damaged_weights(tmp_path: Path, damaged: str, value: float) -> None:
    folder = make_checkpoint(tmp_path, num_layers=NUM_LAYERS)
    tensors = load_file(folder / "model.safetensors")
    tensors[damaged][5, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pipeline = Pipeline(load_stages(open_checkpoint(folder), [1, 1, 1]))
    pipeline.prefill([[1, 2, 3]], [0])
    with pytest.raises(StageError, match="not finite"):
        pipeline.decode()
    last = pipeline.stages[2 if damaged.startswith("lm_head") else 1]
    assert last.num_computed_tokens(0) == 0


def test_two_stages_in_two_threads_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    def answer(prompt: list[int]) -> list[int]:
        pipeline = Pipeline(load_stages(checkpoint, [2, 1]))
        pipeline.prefill([prompt], [0])
        return [pipeline.decode()[0] for _ in range(20)]

    expected = [answer(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, PROMPTS)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_whole_model(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    split = Pipeline(load_stages(checkpoint, [1, 2], dtype))
    whole = Pipeline(load_stages(checkpoint, [3], dtype))
    for pipeline in (split, whole):
        pipeline.prefill(PROMPTS, [4, 0, 2])
    assert [split.decode() for _ in range(6)] == [whole.decode() for _ in range(6)]
    assert torch.backends.mkldnn.enabled
