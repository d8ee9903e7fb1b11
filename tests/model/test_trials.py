"""What new layers take is tried on real ones, and leaves nothing behind."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import StageTime, StageTrial
from distributed_llm.common.types import KV_BLOCK, NO_EPOCH, Epoch, LayerRange
from distributed_llm.worker.compute.trials import try_out
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Drop, Load, Loaded, Serve
from tests import encoder_decoders
from tests.checkpoints import make_checkpoint
from tests.model.workers import Cluster, Plan, Worker, workers
from tests.reference import reference_ids

NUM_LAYERS = 4
RANGES = [(0, 4), (0, 2), (1, 3), (2, 4)]
SIZES = [
    size
    for sequences in (1, 4, 16, 64)
    for size in ((sequences, 8, 1), (1, 0, 8 * sequences), (1, 8 * sequences, 1))
]
WHOLE: Plan = (("a", (0, 4)),)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_layers=NUM_LAYERS)


@pytest.fixture
def one() -> Iterator[Worker]:
    with workers("a") as made:
        yield made["a"]


def stage_of(folder: Path, layers: tuple[int, int] = (0, 4)) -> Stage:
    device = torch.device("cpu")
    held = LayerRange(*layers)
    return Stage.load(open_checkpoint(folder), held, device=device, dtype=torch.float32)


def takes(*seconds: float) -> Callable[[Callable[[], object]], StageTime]:
    """Return what does as it is told, and says that it took so long; the last one again."""
    rest = list(seconds)

    def timed(work: Callable[[], object]) -> StageTime:
        work()
        took_us = round(1e6 * (rest.pop(0) if len(rest) > 1 else rest[0]))
        return StageTime(compute_us=took_us, layers_us=took_us // 2, queued_us=0)

    return timed


def sizes(trials: tuple[StageTrial, ...]) -> list[tuple[int, int, int]]:
    return [(trial.sequences, trial.start, trial.num_tokens) for trial in trials]


# ------------------------------------------------------------------ what is tried


@pytest.mark.parametrize("layers", RANGES)
def test_all_sizes_are_tried_on_any_layers(llama: Path, layers: tuple[int, int]) -> None:
    stage = stage_of(llama, layers)
    assert sizes(try_out(stage, takes(1e-4), kv_tokens=64 * KV_BLOCK)) == SIZES
    assert stage.kv_bytes == 0


def test_there_is_room_for_every_step(llama: Path) -> None:
    stage = stage_of(llama)
    stage.limit_kv(20 * KV_BLOCK * stage.kv_bytes_per_token)
    assert sizes(try_out(stage, takes(1e-4), kv_tokens=20 * KV_BLOCK)) == SIZES[:9]


def test_a_step_that_might_take_too_long_is_not_tried(llama: Path) -> None:
    """If a step of 8 tokens took 0.1 s, one of 32 may take 0.4 s of the 0.45 s that are left."""
    trials = try_out(stage_of(llama), takes(0.1, 0.05), kv_tokens=64 * KV_BLOCK)
    assert sizes(trials) == SIZES[:6]
    trials = try_out(stage_of(llama), takes(0.12, 0.05), kv_tokens=64 * KV_BLOCK)
    assert sizes(trials) == SIZES[:3]


def test_a_slow_machine_tries_each_of_the_smallest_steps_once(llama: Path) -> None:
    rounds = []

    def timed(work: Callable[[], object]) -> StageTime:
        rounds.append(work())
        return StageTime(compute_us=9_000_000, layers_us=8_000_000, queued_us=0)

    trials = try_out(stage_of(llama), timed, kv_tokens=64 * KV_BLOCK)
    assert sizes(trials) == SIZES[:3]
    assert len(rounds) == 4


def test_the_median_of_three_rounds_counts(llama: Path) -> None:
    timed = takes(0.1, 0.003, 0.001, 0.002, 1e-5)
    trials = try_out(stage_of(llama), timed, kv_tokens=KV_BLOCK)
    assert [trial.time.compute_us for trial in trials] == [2000, 10, 10]


def test_what_was_tried_is_forgotten_when_it_fails(llama: Path) -> None:
    stage = stage_of(llama)

    def timed(work: Callable[[], object]) -> StageTime:
        work()
        raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError):
        try_out(stage, timed, kv_tokens=64 * KV_BLOCK)
    assert stage.kv_bytes == 0


# ------------------------------------------------------------------ encoder-decoders


SOURCES = [(1, 0, 8 * n) for n in (1, 4, 16)]
ANSWERS = [each for n in (1, 4, 16) for each in ((n, 8, 1), (1, 8 * n, 1))]


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_decoders.make(tmp_path_factory.mktemp("bart"), "bart")


@pytest.mark.parametrize(
    ("layers", "sources", "answers"),
    [
        ((0, 3), SOURCES, []),
        ((2, 5), SOURCES, ANSWERS),
        ((4, 5), [], ANSWERS),
    ],
)
def test_each_stack_is_tried_with_what_reaches_it(
    bart: Path,
    layers: tuple[int, int],
    sources: list[tuple[int, int, int]],
    answers: list[tuple[int, int, int]],
) -> None:
    """No source is longer than the positions that the model has, which are 128."""
    stage = stage_of(bart, layers)
    trials = try_out(stage, takes(1e-4), kv_tokens=64 * KV_BLOCK, context_length=128)
    assert sizes(tuple(trial for trial in trials if trial.is_source)) == sources
    assert sizes(tuple(trial for trial in trials if not trial.is_source)) == answers
    assert stage.kv_bytes == 0


# ------------------------------------------------------------------ when it is tried


def load(worker: Worker, order: Load) -> Loaded:
    return worker.ask(order, Loaded)


@pytest.mark.parametrize("beside", [None, NO_EPOCH])
def test_first_layers_are_tried_if_that_is_wanted(
    llama: Path, one: Worker, beside: Epoch | None
) -> None:
    cluster = Cluster(llama, WHOLE, {"a": one})
    one.engine.put(Drop())
    untried = load(one, Load(0, cluster.order(2, (0, 4), beside=beside)))
    assert untried.trials == ()
    one.engine.put(Drop())
    tried = load(one, Load(0, cluster.order(3, (0, 4), beside=beside, trials=True)))
    assert sizes(tried.trials)[:3] == SIZES[:3]
    for trial in tried.trials:
        assert 0 < trial.time.layers_us <= trial.time.compute_us
    one.engine.put(Drop() if beside is None else Serve(Epoch(3)))


def test_answers_after_trials_are_those_of_transformers(llama: Path, one: Worker) -> None:
    cluster = Cluster(llama, WHOLE, {"a": one})
    load(one, Load(0, cluster.order(2, (0, 4), trials=True)))
    cluster.serve_epoch(2, WHOLE)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    cluster.prefill([prompt], [len(prompt) - 1])
    while len(cluster.texts[0]) < len(prompt) + 8:
        cluster.decode()
    assert cluster.texts[0] == prompt + reference_ids(llama, prompt, 8)


def test_nothing_is_tried_beside_what_is_served(llama: Path, one: Worker) -> None:
    cluster = Cluster(llama, WHOLE, {"a": one})
    order = cluster.order(2, (0, 2), beside=Epoch(1), trials=True)
    assert load(one, Load(0, order)).trials == ()


def test_layers_that_cannot_be_tried_are_served(
    llama: Path, one: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(llama, WHOLE, {"a": one})

    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("distributed_llm.worker.compute.held_stages.try_out", broken)
    assert load(one, Load(0, cluster.order(2, (0, 4), trials=True))).trials == ()
