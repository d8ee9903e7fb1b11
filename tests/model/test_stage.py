"""A stage under repetition, truncation, failure and bad input."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import MissingPositions, SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.worker.kv.cache import KVCacheFull
from distributed_llm.worker.model import stage as stage_module
from distributed_llm.worker.model.failures import (
    MissingPositionsError,
    ReleasedSequence,
    SequencesFailed,
)
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import HIDDEN_SIZE, VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 18], [16, 18, 0, 33, 98]]
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    return open_checkpoint(make_checkpoint(folder, num_layers=NUM_LAYERS))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)


@pytest.fixture
def pipeline(checkpoint: Checkpoint) -> Pipeline:
    made = Pipeline(load_stages(checkpoint, [1, 1, 1]))
    made.prefill(PROMPTS, [len(prompt) - 1 for prompt in PROMPTS])
    return made


def whole_stage(checkpoint: Checkpoint) -> Stage:
    return load_stages(checkpoint, [NUM_LAYERS])[0]


def piece(start: int, num_tokens: int, sequence_id: int = 0) -> SequenceSlice:
    return SequenceSlice(
        sequence_id=SequenceId(sequence_id),
        start=start,
        num_tokens=num_tokens,
        sample=True,
        sampling=Sampling(),
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
        assert [stage.num_computed_tokens(SequenceId(i)) for i in range(3)] == [8, 3, 5]


def test_a_slice_that_starts_earlier_forgets_what_came_after(pipeline: Pipeline) -> None:
    tokens = [pipeline.decode() for _ in range(4)]
    texts = [text[: len(prompt)] for text, prompt in zip(pipeline.texts, PROMPTS, strict=True)]
    # Another continuation, then the first one again: nothing of the other may be left.
    pipeline.texts = [[*text, 77, 78, 79, 80, 81] for text in texts]
    pipeline.run([(i, len(t), len(t) + 5) for i, t in enumerate(texts)])
    pipeline.texts = texts
    pipeline.done = [len(prompt) - 1 for prompt in PROMPTS]
    assert [pipeline.decode() for _ in range(4)] == tokens


def masks_of(*allowed: int, rows: int = 1) -> Any:
    bits = np.zeros((rows, VOCAB_SIZE), dtype=np.uint8)
    bits[:, list(allowed)] = 1
    return np.packbits(bits, axis=1, bitorder="little")


def test_each_mask_is_for_its_slice(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    slices = [piece(0, 2, sequence_id=i) for i in range(4)]
    for i in (1, 3):
        slices[i] = msgspec.structs.replace(slices[i], masked=True)
    masks = np.concatenate([masks_of(7), masks_of(9)])
    free = stage.run([piece(0, 2, sequence_id=i) for i in range(4)], ids(*[1, 2] * 4), None)
    output = stage.run(slices, ids(*[1, 2] * 4), None, masks)
    assert free.token_ids is not None
    assert output.token_ids is not None
    (token, *_) = free.token_ids.tolist()
    assert output.token_ids.tolist() == [token, 7, token, 9]


@pytest.mark.parametrize(
    ("part", "masks"),
    [
        ({"masked": True}, None),
        ({"masked": True}, masks_of(1, rows=2)),
        ({"masked": True}, masks_of(1)[0]),
        ({"masked": True}, masks_of(1).astype(np.int32)),
        ({}, masks_of(1)),
        ({"masked": True, "sample": False, "sampling": None}, masks_of(1)),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, part: dict[str, Any], masks: Any
) -> None:
    stage = whole_stage(checkpoint)
    with pytest.raises(StageError, match="mask"):
        stage.run([msgspec.structs.replace(piece(0, 2), **part)], ids(1, 2), None, masks)
    assert stage.num_computed_tokens(SequenceId(0)) == 0


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
        MissingPositions(sequence_id=SequenceId(5), have=0),
        MissingPositions(sequence_id=SequenceId(9), have=0),
    )
    assert stage.num_computed_tokens(SequenceId(0)) == 3
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
    assert [stage.num_computed_tokens(SequenceId(i)) for i in (0, 1)] == [3, 0]
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
        stage.release([SequenceId(0), SequenceId(2), SequenceId(12345)])
        assert stage.num_computed_tokens(SequenceId(0)) == 0
        assert stage.num_computed_tokens(SequenceId(1)) == 2
        stage.release([SequenceId(1)])
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
        torch.zeros(1, HIDDEN_SIZE, dtype=torch.int32),
        torch.zeros(1, 1, HIDDEN_SIZE),
    ],
    ids=["none", "rows", "width", "dtype", "dimensions"],
)
def test_bad_hidden_states_are_refused(checkpoint: Checkpoint, hidden_states: Any) -> None:
    stage = Stage.load(checkpoint, LayerRange(1, 2), device=CPU, dtype=torch.float32)
    with pytest.raises(StageError, match=r"needs floats of shape \[1, 32\]"):
        stage.run([piece(0, 1)], ids(1), hidden_states)
    first = Stage.load(checkpoint, LayerRange(0, 1), device=CPU, dtype=torch.float32)
    with pytest.raises(StageError, match="first stage was given hidden states"):
        first.run([piece(0, 1)], ids(1), torch.zeros(1, HIDDEN_SIZE))


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_hidden_states_come_in_any_wire_dtype(checkpoint: Checkpoint, wire: torch.dtype) -> None:
    first, last = load_stages(checkpoint, [1, 2])
    hidden_states = first.run([piece(0, 3)], ids(1, 2, 3), None).hidden_states
    assert hidden_states is not None
    assert hidden_states.dtype == torch.float32
    rounded = hidden_states.to(wire)
    given = last.run([piece(0, 3)], ids(1, 2, 3), rounded)
    expected = last.run([piece(0, 3, sequence_id=1)], ids(1, 2, 3), rounded.to(torch.float32))
    assert given.token_ids is not None
    assert expected.token_ids is not None
    assert given.token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize(
    ("family", "layers", "per_layer"),
    [("llama", 2, 2 * 2 * 8), ("gpt2", 3, 2 * 4 * 8), ("qwen3", 1, 2 * 2 * 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_position_are_measured(
    tmp_path: Path, family: str, layers: int, per_layer: int, dtype: torch.dtype
) -> None:
    """Keys and values, of `heads` times `head_dim` numbers each, in every layer."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=4))
    stage = Stage.load(checkpoint, LayerRange(1, 1 + layers), device=CPU, dtype=dtype)
    assert stage.kv_bytes_per_token == layers * per_layer * dtype.itemsize
    assert stage.kv_bytes == 0
    stage.run([piece(0, 65)], torch.zeros(65, dtype=torch.int32), torch.zeros(65, HIDDEN_SIZE))
    assert stage.kv_bytes == 2 * KV_BLOCK * stage.kv_bytes_per_token


def test_a_step_beyond_the_limit_is_refused_before_anything_is_touched(
    checkpoint: Checkpoint,
) -> None:
    stage = whole_stage(checkpoint)
    stage.limit_kv(3 * KV_BLOCK * stage.kv_bytes_per_token + 1)
    tokens = [1] * KV_BLOCK
    stage.run([piece(0, KV_BLOCK), piece(0, KV_BLOCK, sequence_id=1)], ids(*tokens, *tokens), None)
    for _ in range(2):
        with pytest.raises(KVCacheFull) as caught:
            stage.run([piece(KV_BLOCK, 1), piece(KV_BLOCK, 1, sequence_id=1)], ids(1, 1), None)
        assert caught.value.code == "kv_full"
        assert [stage.num_computed_tokens(SequenceId(i)) for i in (0, 1)] == [KV_BLOCK, KV_BLOCK]
    stage.release([SequenceId(1)])
    stage.run([piece(KV_BLOCK, 1)], ids(1), None)


def test_how_to_sample_is_told_once_and_may_be_told_anew(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    stage.run([piece(0, 3)], ids(1, 2, 3), None)
    again = SequenceSlice(sequence_id=SequenceId(0), start=2, num_tokens=1, sample=True)
    greedy = stage.run([again], ids(3), None).token_ids
    biased = Sampling(logit_bias=((77, 1000.0),))
    told = SequenceSlice(
        sequence_id=SequenceId(0), start=2, num_tokens=1, sample=True, sampling=biased
    )
    assert greedy is not None
    assert greedy.tolist() != [77]
    for part in (told, again):
        tokens = stage.run([part], ids(3), None).token_ids
        assert tokens is not None
        assert tokens.tolist() == [77]


def test_a_sequence_of_which_nothing_is_known_cannot_sample(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    first = SequenceSlice(sequence_id=SequenceId(0), start=0, num_tokens=3)
    stage.run([first], ids(1, 2, 3), None)
    untold = SequenceSlice(sequence_id=SequenceId(0), start=3, num_tokens=1, sample=True)
    for part in (
        untold,
        SequenceSlice(sequence_id=SequenceId(4), start=0, num_tokens=1, sample=True),
    ):
        with pytest.raises(MissingPositionsError) as caught:
            stage.run([part], ids(4), None)
        assert caught.value.missing == (MissingPositions(sequence_id=part.sequence_id, have=0),)
    assert stage.num_computed_tokens(SequenceId(0)) == 3
    # Stages before the last do not sample, and are not told how.
    middle = Stage.load(checkpoint, LayerRange(0, 1), device=CPU, dtype=torch.float32)
    untold = SequenceSlice(sequence_id=SequenceId(0), start=0, num_tokens=1, sample=True)
    assert middle.run([untold], ids(4), None).hidden_states is not None


def test_a_late_task_of_a_released_sequence_is_void(checkpoint: Checkpoint) -> None:
    stage = whole_stage(checkpoint)
    stage.run([piece(0, 3), piece(0, 1, sequence_id=1)], ids(1, 2, 3, 4), None)
    stage.release([SequenceId(0), SequenceId(7)])
    held = stage.kv_bytes
    for late in (0, 7):
        with pytest.raises(ReleasedSequence, match=rf"sequences \[{late}\] were released"):
            stage.run([piece(1, 1, sequence_id=1), piece(0, 1, late)], ids(1, 1), None)
    assert stage.kv_bytes == held
    assert stage.num_computed_tokens(SequenceId(1)) == 1
    stage.reset()
    stage.run([piece(0, 1)], ids(1), None)


def test_the_memory_of_released_sequences_is_bounded(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_MAX_RELEASED", 3)
    stage = whole_stage(checkpoint)
    stage.release([SequenceId(1), SequenceId(2), SequenceId(3), SequenceId(4)])
    stage.run([piece(0, 1, sequence_id=1)], ids(1), None)
    with pytest.raises(ReleasedSequence):
        stage.run([piece(0, 1, sequence_id=2)], ids(1), None)


def test_log_probabilities_come_with_the_tokens(checkpoint: Checkpoint, whole: Any) -> None:
    stage = whole_stage(checkpoint)
    asked = (3, None, 0, 9)
    prompts = [*PROMPTS, [1, 2]]
    slices = [
        SequenceSlice(
            sequence_id=SequenceId(i),
            start=0,
            num_tokens=len(prompt),
            sample=i != 3,
            sampling=Sampling(temperature=1.0, seed=5, repetition_penalty=1.5, logprobs=asked[i]),
        )
        for i, prompt in enumerate(prompts)
    ]
    tokens = ids(*(token for prompt in prompts for token in prompt))
    output = stage.run(slices, tokens, None)
    assert output.token_ids is not None
    assert output.logprobs is not None
    assert output.logprob_ids is not None
    assert output.logprobs.shape == output.logprob_ids.shape == (3, 4)
    for row, prompt in enumerate(PROMPTS):
        if asked[row] is None:
            assert not output.logprobs[row].any()
            assert not output.logprob_ids[row].any()
            continue
        assert output.logprob_ids[row, 0] == output.token_ids[row]
        with torch.inference_mode():
            logits = whole(input_ids=torch.tensor([prompt])).logits[0, -1]
        wanted = torch.log_softmax(logits, dim=0)
        token_ids = output.logprob_ids[row].to(torch.int64)
        torch.testing.assert_close(output.logprobs[row], wanted[token_ids], atol=1e-4, rtol=1e-4)
        assert token_ids[1:].tolist() == wanted.topk(3).indices.tolist()
    plain = stage.run([piece(0, 1, sequence_id=9)], ids(1), None)
    assert plain.logprobs is plain.logprob_ids is None


@pytest.mark.parametrize("damaged", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_no_token_comes_from_numbers_that_overflow(
    tmp_path: Path, damaged: str, value: float
) -> None:
    folder = make_checkpoint(tmp_path, num_layers=NUM_LAYERS)
    tensors = load_file(folder / "model.safetensors")
    tensors[damaged][5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pipeline = Pipeline(load_stages(open_checkpoint(folder), [1, 1, 1]))
    pipeline.prefill([[1, 2, 3]], [0])
    with pytest.raises(StageError, match="not finite"):
        pipeline.decode()
    last = pipeline.stages[2 if damaged.startswith("lm_head") else 1]
    assert last.num_computed_tokens(SequenceId(0)) == 0


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


# ------------------------------------------------------------------ sequences that fail


def last_step(pipeline: Pipeline, samplings: dict[int, Sampling]) -> list[int]:
    """Return whom the last stage names when it samples for all three texts."""
    tokens = torch.tensor([text[-1] for text in pipeline.texts], dtype=torch.int32)
    sequences = [
        SequenceSlice(
            sequence_id=SequenceId(number),
            start=len(text) - 1,
            num_tokens=1,
            sample=True,
            sampling=samplings.get(number, Sampling()),
        )
        for number, text in enumerate(pipeline.texts)
    ]
    hidden = None
    for stage in pipeline.stages[:-1]:
        hidden = stage.run(sequences, tokens, hidden).hidden_states
    with pytest.raises(SequencesFailed) as caught:
        pipeline.stages[-1].run(sequences, tokens, hidden)
    return list(caught.value.sequence_ids)


def test_a_sequence_without_any_token_left_is_named(pipeline: Pipeline) -> None:
    all_of_them = tuple(range(VOCAB_SIZE))
    assert last_step(pipeline, {1: Sampling(suppress_tokens=all_of_them)}) == [1]
    assert pipeline.decode()  # the others go on


def test_a_sequence_whose_numbers_are_not_finite_is_named(pipeline: Pipeline) -> None:
    tokens = torch.tensor([text[-1] for text in pipeline.texts], dtype=torch.int32)
    sequences = [piece(len(text) - 1, 1, sequence_id=n) for n, text in enumerate(pipeline.texts)]
    hidden = torch.zeros(3, HIDDEN_SIZE)
    hidden[2, 3] = float("nan")
    with pytest.raises(SequencesFailed, match="not finite") as caught:
        pipeline.stages[1].run(sequences, tokens, hidden)
    assert caught.value.sequence_ids == (2,)


def load_mixed(checkpoint: Checkpoint, dtypes: list[torch.dtype]) -> list[Stage]:
    return [
        Stage.load(checkpoint, LayerRange(i, i + 1), device=CPU, dtype=dtype)
        for i, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("other", [torch.float16, torch.float32])
def test_stages_of_one_pipeline_may_compute_in_other_dtypes(
    checkpoint: Checkpoint, whole: Any, other: torch.dtype
) -> None:
    """Hidden states travel in bfloat16, whatever a stage computes in."""
    stages = load_mixed(checkpoint, [torch.bfloat16, other, torch.bfloat16])
    tokens, states = ids(*PROMPTS[0]), None
    sequences = [piece(0, len(PROMPTS[0]))]
    for stage in stages[:2]:
        output = stage.run(sequences, tokens, states)
        assert output.hidden_states is not None
        states = output.hidden_states.to(torch.bfloat16)
    expected = whole(tokens.long()[None], output_hidden_states=True).hidden_states[2][0]
    assert states is not None
    assert (states.float() - expected).norm() < 0.02 * expected.norm()
    assert stages[2].run(sequences, tokens, states).token_ids is not None


def test_states_that_float16_cannot_hold_fail_their_sequence_and_say_what_to_do(
    checkpoint: Checkpoint,
) -> None:
    stage = load_mixed(checkpoint, [torch.float16] * 2)[1]
    hidden = torch.ones(3, HIDDEN_SIZE, dtype=torch.bfloat16)
    hidden[1, 3] = 70000.0
    sequences = [piece(0, 1, sequence_id=number) for number in range(3)]
    with pytest.raises(
        SequencesFailed, match=r"torch\.float16 is too narrow.*--dtype float32"
    ) as e:
        stage.run(sequences, ids(1, 2, 3), hidden)
    assert e.value.sequence_ids == (1,)


def test_a_sequence_with_tokens_of_another_model_is_named(pipeline: Pipeline) -> None:
    sequences = [piece(0, 2, sequence_id=5), piece(0, 1, sequence_id=6)]
    tokens = torch.tensor([1, 2, VOCAB_SIZE], dtype=torch.int32)
    with pytest.raises(SequencesFailed, match="another model") as caught:
        pipeline.stages[0].run(sequences, tokens, None)
    assert caught.value.sequence_ids == (6,)
