"""Split encoder-decoders answer what transformers answers: for every type, token for token.

The reference is transformers alone: `generate`, and a whole forward, on each text by itself.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.encoder_decoders import ENCODER_DECODERS
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.cluster.kv_transfers import transfers_between
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model.failures import SequencesFailed
from distributed_llm.worker.model.sampler import sample
from distributed_llm.worker.model.stage import Stage
from tests.encoder_decoders import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    PAD,
    SETTINGS,
    START,
    answered,
    build,
    make,
    numbers,
)
from tests.model.stack_driver import CPU, StackPipeline

NUM_LAYERS = ENCODER_LAYERS + DECODER_LAYERS
SOURCES = [numbers(length, length) for length in (23, 1, 9)]
"""Longer than windows and than the most distant bucket of T5's biases, and shorter."""
NEW_TOKENS = 7
GREEDY = Sampling()
HOT = Sampling(temperature=2.0, seed=1)
"""It tells nearly equal logits apart."""
FREQUENCIES = 260
"""Bytes of those of rotary positions, which are no weights, in both stacks of t5gemma2, and of the
scale of its embedding; t5gemma has fewer."""
SPLITS: dict[str, tuple[int, ...]] = {
    "one stage": (),
    "encoder and decoder": (ENCODER_LAYERS,),
    "within both": (2, 4),
    "a stage for each layer": tuple(range(1, NUM_LAYERS)),
}


class Expected:
    """What transformers makes of the sources: answers, and the logits before each token."""

    def __init__(self, whole: Any) -> None:
        self.answers = [answered(whole, source, NEW_TOKENS) for source in SOURCES]
        self._logits = []
        for source, answer in zip(SOURCES, self.answers, strict=True):
            with torch.inference_mode():
                made = whole(
                    input_ids=torch.tensor([list(source)]),
                    attention_mask=torch.ones((1, len(source)), dtype=torch.int64),
                    decoder_input_ids=torch.tensor([[START, *answer]]),
                    use_cache=False,
                )
            self._logits.append(made.logits[0])

    def sampled(self, number: int, length: int) -> int:
        """Return what `HOT` samples after the first `length` tokens of an answer."""
        row = self._logits[number][length - 1][None]
        return int(sample(row, [HOT], [length], [as_token_ids(())])[0])


@cache
def checkpoint_of(model_type: str) -> Checkpoint:
    return open_checkpoint(make(Path(mkdtemp()), model_type))


@cache
def whole_of(model_type: str) -> Any:
    """Return the model of a checkpoint, as transformers has it."""
    return build(model_type)


@cache
def expected_of(model_type: str) -> Expected:
    return Expected(whole_of(model_type))


@pytest.mark.parametrize("model_type", SETTINGS)
def test_tokens_are_those_of_transformers(model_type: str) -> None:
    """Greedy and sampled; in 1 to 5 stages; ragged, computed again in one chunk, and shared."""
    checkpoint, expected = checkpoint_of(model_type), expected_of(model_type)
    for name, cuts in SPLITS.items():
        pipeline = StackPipeline(checkpoint, cuts)
        _check_bytes(pipeline.stages, checkpoint)
        pipeline.read(SOURCES, (START,))
        for length in range(1, NEW_TOKENS + 1):
            parts = [(i, length - 1, length) for i in range(len(SOURCES))]
            hot = pipeline.step(parts, HOT)
            assert hot == [expected.sampled(i, length) for i in range(3)], f"{name}: sampled"
            found = pipeline.step(parts, GREEDY)
            wanted = [answer[length - 1] for answer in expected.answers]
            assert found == wanted, f"{name}: token {length}"
            for i, token in enumerate(found):
                pipeline.answers[i].append(token)
        _check_again(name, pipeline, expected)


def _check_bytes(stages: Sequence[Stage], checkpoint: Checkpoint) -> None:
    planned = checkpoint.layer_kv_bytes("float32")
    cost = model_cost(checkpoint, "float32")
    for stage in stages:
        own = planned[stage.layers.start : stage.layers.stop]
        assert stage.kv_bytes_per_token == sum(own), f"planned KV cache of {stage.layers}"
        beside = stage.weight_bytes - cost.weight_bytes(stage.layers)
        assert 0 <= beside <= FREQUENCIES, f"planned weights of {stage.layers}"


def _check_again(name: str, pipeline: StackPipeline, expected: Expected) -> None:
    """Compute an answer again, beside others and beside one that shares its beginning."""
    for stage in pipeline.stages:
        stage.release([SequenceId(1)])
    again, length = len(pipeline.sources), 5
    pipeline.read([SOURCES[0]], (START, *expected.answers[0][: length - 1]))
    found = pipeline.step([(again, 0, length), (2, 2, 3), (1, 0, 4)], HOT)
    wanted = [expected.sampled(0, length), expected.sampled(2, 3), expected.sampled(1, 4)]
    assert found == wanted, f"{name}: computed again"
    child = pipeline.share(again, 3)
    found = pipeline.step([(child, 2, 3), (again, length - 1, length)], HOT, child)
    wanted = [expected.sampled(0, 3), expected.sampled(0, length)]
    assert found == wanted, f"{name}: shared"
    pipeline.answers[child].append(expected.answers[0][2])
    found = pipeline.step([(child, 3, 4), (again, length - 1, length)], HOT)
    wanted = [expected.sampled(0, 4), expected.sampled(0, length)]
    assert found == wanted, f"{name}: after what is shared"


@pytest.mark.parametrize("model_type", SETTINGS)
def test_padding_tokens_are_tokens_like_others(model_type: str) -> None:
    """In a source, as the start, and within an answer; as with the mask that tokenizers make."""
    source = [7, PAD, 9, 11, PAD, PAD, 5, 60, 77, 2]
    made = answered(whole_of(model_type), source, NEW_TOKENS, (PAD,), forced_bos_token_id=PAD)
    answer = [PAD, *made]
    assert answer[1] == PAD
    pipeline = StackPipeline(checkpoint_of(model_type), (ENCODER_LAYERS,))
    pipeline.read([SOURCES[0], source], answer)
    parts = [(1, 0, 3), *((1, length - 1, length) for length in range(4, NEW_TOKENS + 1))]
    assert [pipeline.step([part], GREEDY) for part in parts] == [[t] for t in answer[3:]]


def test_every_type_is_tried() -> None:
    assert set(SETTINGS) == ENCODER_DECODERS


def test_a_stage_with_encoder_layers_keeps_nothing() -> None:
    checkpoint = checkpoint_of("t5")
    pipeline = StackPipeline(checkpoint, (2,))
    pipeline.read(SOURCES, (START,))
    assert pipeline.stages[0].kv_bytes == 0
    assert pipeline.stages[0].num_computed_tokens(SequenceId(1)) == 0
    assert pipeline.stages[1].num_computed_tokens(SequenceId(1)) == len(SOURCES[0])


def test_a_source_that_fails_leaves_nothing_with_an_encoder() -> None:
    """A stage of the encoder alone is not told which sequences are freed later."""
    pipeline = StackPipeline(checkpoint_of("t5"), (2,))
    stage = pipeline.stages[0]

    def fail() -> None:
        raise RuntimeError("the machine failed")

    stage.progress = fail
    with pytest.raises(RuntimeError, match="the machine failed"):
        pipeline.read(SOURCES, (START,))
    assert stage.kv_manifest().sequences == ()


def _part(start: int, count: int, source: int, **values: Any) -> SequenceSlice:
    return SequenceSlice(
        sequence_id=SequenceId(1), start=start, num_tokens=count, source=source, **values
    )


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([_part(0, 3, 5)], SequencesFailed),
        ([_part(0, 5, 5, sample=True, sampling=GREEDY)], SequencesFailed),
        ([_part(0, 5, 0)], StageError),
    ],
)
def test_steps_that_are_of_no_kind_are_refused(
    parts: list[SequenceSlice], error: type[Exception]
) -> None:
    checkpoint = checkpoint_of("t5")
    layers = LayerRange(0, NUM_LAYERS)
    stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32)
    ids = torch.ones(sum(part.num_tokens for part in parts), dtype=torch.int32)
    with pytest.raises(error):
        stage.run(parts, ids, None)


Plan = dict[str, tuple[int, int]]
BEFORE: Plan = {"a": (0, 2), "b": (2, 4), "c": (4, 5)}
AFTER: dict[str, Plan] = {
    "a worker leaves": {"a": (0, 3), "b": (3, 5)},
    "a stage of both becomes one of the encoder": {"b": (0, 1), "a": (1, 4), "c": (4, 5)},
    "all at once on a new worker": {"d": (0, 5)},
}


def _stages(plan: Plan) -> list[PipelineStage]:
    return [
        PipelineStage(PeerId(name.encode()), WorkerId(name), LayerRange(*layers))
        for name, layers in plan.items()
    ]


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_layers_move_while_answers_are_written(model_type: str, name: str) -> None:
    """What decoder layers keep of sources and answers travels; nothing is computed again."""
    checkpoint, expected = checkpoint_of(model_type), expected_of(model_type)
    pipeline = StackPipeline(checkpoint, (2, 4))
    old = dict(zip(BEFORE, pipeline.stages, strict=True))
    new = {
        worker: Stage.load(
            checkpoint,
            LayerRange(*layers),
            device=CPU,
            dtype=torch.float32,
            donor=old.get(worker),
        )
        for worker, layers in AFTER[name].items()
    }
    pipeline.read(SOURCES, (START,))
    _write(pipeline, expected, 2)
    arriving: dict[str, list[Any]] = {worker: [] for worker in new}
    moves = transfers_between(_stages(BEFORE), _stages(AFTER[name]), ENCODER_LAYERS)
    pairs = []
    for one in moves:
        into = new[one.receiver.worker].import_kv(one.layers, 1 << 24)
        arriving[one.receiver.worker].append(into)
        pairs.append((old[one.sender.worker], old[one.sender.worker].export_kv(one.layers), into))
    for rest in (None, ()):
        for _, out, into in pairs:
            while (pieces := out.next_chunk(1000, 100, rest)) is not None:
                for piece in pieces:
                    into.add(piece)
        if rest is None:
            _write(pipeline, expected, 1)
    for source, _, into in pairs:
        into.update(source.kv_manifest())
    for worker, stage in new.items():
        stage.assemble_kv(old.get(worker), arriving[worker])
    pipeline.stages = list(new.values())
    _write(pipeline, expected, 2)


def _write(pipeline: StackPipeline, expected: Expected, count: int) -> None:
    """Compute the next tokens of all answers, which have to be those of transformers."""
    for _ in range(count):
        length = len(pipeline.answers[0])
        parts = [(i, length - 1, length) for i in range(len(SOURCES))]
        assert pipeline.step(parts, HOT) == [expected.sampled(i, length) for i in range(3)]
        for answer, known in zip(pipeline.answers, expected.answers, strict=True):
            answer.append(known[length - 1])
