"""Layers and KV cache move between compute threads, and no token changes."""

import gc
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distributed_llm.common.errors import DistributedLLMError, NotEnoughMemory, StageError
from distributed_llm.common.messages import KVEnd, KVPieces
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.common.wording import size_text
from distributed_llm.worker.compute import kv_orders, loading
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import (
    AssembleKV,
    Drop,
    ExportKV,
    ImportKV,
    KVAssembled,
    KVExported,
    KVImported,
    KVOrderFailed,
    Load,
    Loaded,
    LoadFailed,
    Serve,
    Unload,
)
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.workers import Cluster, Plan, Worker, carried, workers
from tests.reference import check_varied, reference_ids
from tests.waiting import eventually

NUM_LAYERS = 6
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (75, 9, 100)]
REST = [7, 8, 9]
ANSWER = 16
PENALTY = Sampling(repetition_penalty=3.0)

START: Plan = (("a", (0, 2)), ("b", (2, 4)), ("c", (4, 6)))
PLANS: dict[str, Plan] = {
    "one grows and its neighbour shrinks": (("a", (0, 3)), ("b", (3, 4)), ("c", (4, 6))),
    "all borders move": (("a", (0, 1)), ("b", (1, 5)), ("c", (5, 6))),
    "a whole stage goes to another worker": (("a", (0, 2)), ("d", (2, 4)), ("c", (4, 6))),
    "first and last change places": (("c", (0, 2)), ("b", (2, 4)), ("a", (4, 6))),
    "all at once on a new worker": (("d", (0, 6)),),
}
BORDERS = PLANS["all borders move"]
EVERYWHERE = PLANS["a whole stage goes to another worker"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(path, request.param, num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_layers=NUM_LAYERS)


@pytest.fixture
def four() -> Iterator[dict[str, Worker]]:
    with workers(*"abcd") as made:
        yield made


def start(folder: Path, held: dict[str, Worker]) -> Cluster:
    """Two texts that answer, and one that will be released."""
    cluster = Cluster(folder, START, held)
    cluster.prefill(PROMPTS, [74, 8, 99])
    for _ in range(3):
        cluster.decode(PENALTY)
    return cluster


def finish(cluster: Cluster, numbers: tuple[int, ...]) -> None:
    """Let these texts answer, and compare them with what transformers answers."""
    prompts = {0: PROMPTS[0], 1: PROMPTS[1], 3: [*PROMPTS[0][:70], *REST]}
    while left := [n for n in numbers if len(cluster.texts[n]) < len(prompts[n]) + ANSWER]:
        cluster.decode(PENALTY, numbers=left)
    for number in numbers:
        expected = reference_ids(cluster.folder, prompts[number], ANSWER, repetition_penalty=3.0)
        check_varied(expected)
        assert cluster.texts[number] == prompts[number] + expected


def kv_bytes(held: dict[str, Worker]) -> int:
    assert all(worker.silent for worker in held.values())
    return sum(worker.engine.vitals.kv_bytes for worker in held.values())


def move(cluster: Cluster, epoch: int, plan: Plan) -> None:
    """Make a whole move without a step between: load, copy, hand over, commit."""
    cluster.begin_to_load(epoch, plan)
    cluster.end_to_load(plan)
    cluster.copy(epoch, plan)
    cluster.copy(epoch, plan, rest=True)
    cluster.assemble(epoch, plan)
    cluster.commit(epoch, plan)


# ------------------------------------------------------------------ moving


@pytest.mark.parametrize("name", PLANS)
def test_tokens_are_those_of_transformers(
    folder: Path, four: dict[str, Worker], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(kv_orders, "MAX_PIECES_BYTES", 30_000)
    monkeypatch.setattr(kv_orders, "MAX_PIECES_SENT", 3)
    plan = PLANS[name]
    cluster = start(folder, four)
    for worker in four.values():
        worker.gate.clear()
    cluster.begin_to_load(2, plan)
    cluster.decode(PENALTY)
    for worker in four.values():
        worker.gate.set()
    cluster.decode(PENALTY)
    for loaded in cluster.end_to_load(plan):
        assert (loaded.epoch, loaded.kv_tokens) == (2, 4096)
        assert loaded.weight_bytes > 0
    assert cluster.copy(2, plan, most=2) > 0
    child = cluster.share(0, 70, REST)
    cluster.decode(PENALTY, numbers=[0, 1, child])
    cluster.copy(2, plan, most=2)
    cluster.release(2)
    cluster.decode(PENALTY, numbers=[1, child])
    cluster.copy(2, plan)
    assert cluster.copy(2, plan) == 0
    cluster.decode(PENALTY, numbers=[0, 1])
    assert cluster.copy(2, plan, rest=True) > 0
    cluster.assemble(2, plan)
    cluster.commit(2, plan)
    finish(cluster, (0, 1, child))


def test_one_move_follows_another(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    cluster.release(2)
    for epoch, plan in enumerate((*PLANS.values(), START), start=2):
        move(cluster, epoch, plan)
        cluster.decode(PENALTY, numbers=[0, 1])
        for name in set(four) - dict(plan).keys():
            four[name].engine.put(Drop())
    finish(cluster, (0, 1))
    assert kv_bytes(four) > 0
    cluster.release(0, 1)
    assert kv_bytes(four) == 0


def test_without_copying_the_new_stages_begin_empty(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    cluster.begin_to_load(2, BORDERS)
    cluster.end_to_load(BORDERS)
    cluster.commit(2, BORDERS)
    with pytest.raises(StageError, match="positions are missing"):
        cluster.decode(PENALTY, numbers=[0])
    cluster.done = [0] * 3
    finish(cluster, (0, 1))


PHASES = ("loading", "loaded", "copying", "copied", "told", "assembled")


@pytest.mark.parametrize("phase", PHASES)
def test_a_move_may_be_cancelled_at_any_time(
    llama: Path, four: dict[str, Worker], phase: str
) -> None:
    plan = BORDERS
    cluster = start(llama, four)
    before = kv_bytes(four)
    reached = PHASES.index(phase)
    for worker in four.values() if phase == "loading" else ():
        worker.gate.clear()
    cluster.begin_to_load(2, plan)
    if reached >= 1:
        cluster.end_to_load(plan)
    if reached >= 2:
        cluster.copy(2, plan, most=1)
    if reached >= 3:
        cluster.copy(2, plan)
    if reached >= 4:
        cluster.copy(2, plan, rest=True)
    if reached >= 5:
        cluster.assemble(2, plan)
    assert (kv_bytes(four) > before) == (reached >= 2)
    cluster.cancel(2)
    for worker in four.values():
        worker.gate.set()
        eventually(lambda worker=worker: not worker.engine._stages.is_loading_beside)  # type: ignore[misc]
    assert kv_bytes(four) == before
    cluster.decode(PENALTY)
    for name in "abc":
        failed = four[name].ask(AssembleKV(0, Epoch(2)), KVOrderFailed)
        assert "no layers of plan 2" in str(failed.error)
    move(cluster, 3, plan)
    finish(cluster, (0, 1))


def test_memory_of_what_is_not_served_any_more_is_given_back(
    llama: Path, four: dict[str, Worker]
) -> None:
    cluster = start(llama, four)
    served: Any = four["a"].engine._stages.served
    weights = [weakref.ref(p) for p in served.stage._forward._model.parameters()]
    del served
    gc.disable()
    try:
        move(cluster, 2, BORDERS)
        cluster.decode(PENALTY)
        while four["a"].engine._stages._to_free:
            four["a"].ask(AssembleKV(0, Epoch(9)), KVOrderFailed)
        now: Any = four["a"].engine._stages.served
        kept = {id(p) for p in now.stage._forward._model.parameters()}
        assert {id(w) for ref in weights if (w := ref()) is not None} <= kept
        assert sum(ref() is None for ref in weights) > len(weights) // 3
    finally:
        gc.enable()


def test_every_layer_is_progress(llama: Path, four: dict[str, Worker]) -> None:
    layers: list[int] = []
    for worker in four.values():
        worker.engine._stages._after_layer = lambda: layers.append(1)
    cluster = Cluster(llama, START, four)
    cluster.prefill(PROMPTS, [74, 8, 99])
    assert len(layers) == NUM_LAYERS
    move(cluster, 2, BORDERS)
    cluster.decode(PENALTY)
    assert len(layers) == 2 * NUM_LAYERS


# ------------------------------------------------------------------ loading


def test_what_is_given_up_while_it_loads_is_not_told_of(
    llama: Path, four: dict[str, Worker]
) -> None:
    cluster = Cluster(llama, START, four)
    worker = four["a"]
    worker.gate.clear()
    worker.engine.put(Load(0, cluster.order(2, (0, 3), beside=Epoch(1))))
    worker.engine.put(Load(0, cluster.order(3, (0, 4), beside=Epoch(1))))
    worker.gate.set()
    assert worker.next(Loaded).epoch == 3
    worker.gate.clear()
    worker.engine.put(Load(0, cluster.order(4, (0, 5), beside=Epoch(1))))
    worker.engine.put(Serve(Epoch(3)))  # gone: a newer order took its place
    worker.engine.put(Unload(Epoch(4)))
    worker.gate.set()
    cluster.prefill(PROMPTS, [0, 0, 0])
    cluster.decode(PENALTY, numbers=[1])  # the first one is served still
    for given_up in (Unload(Epoch(4)), Drop()):
        worker.gate.clear()
        worker.engine.put(Load(0, cluster.order(4, (0, 2), beside=Epoch(1))))
        worker.engine.put(given_up)
        worker.gate.set()
        eventually(lambda: not worker.engine._stages.is_loading_beside)
        assert worker.silent
    worker.gate.clear()
    worker.engine.put(Load(0, cluster.order(5, (0, 2), beside=Epoch(1))))
    worker.engine.put(Load(0, cluster.order(6, (0, 3))))
    worker.gate.set()
    assert worker.next(Loaded).epoch == 6
    assert worker.silent


def test_a_void_order_is_passed_over_in_silence(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    worker = four["b"]
    worker.gate.clear()
    worker.engine.put(Load(0, cluster.order(2, (1, 4), beside=Epoch(1))))
    assert worker.silent
    worker.void = lambda order: order.session == 0
    worker.gate.set()
    eventually(lambda: not worker.engine._stages.is_loading_beside)
    worker.engine.put(ExportKV(0, Epoch(2), LayerRange(2, 3), 1, False))
    worker.engine.put(AssembleKV(0, Epoch(2)))
    assert worker.silent
    worker.void = lambda order: False
    worker.ask(AssembleKV(0, Epoch(2)), KVOrderFailed)
    finish(cluster, (0, 1))


def test_a_worker_without_work_loads_beside_nothing(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    order = cluster.order(2, (2, 4), beside=Epoch(1), imports=(LayerRange(2, 4),))
    loaded = four["d"].ask(Load(0, order), Loaded)
    assert loaded.load_s > 0
    assert four["d"].engine.vitals.kv_bytes == 0


def test_another_model_is_not_loaded_beside(
    llama: Path, four: dict[str, Worker], tmp_path: Path
) -> None:
    cluster = start(llama, four)
    other = Cluster(make_checkpoint(tmp_path, num_layers=NUM_LAYERS, seed=1), (), {})
    for order in (
        other.order(2, (0, 3), beside=Epoch(1)),
        cluster.order(2, (0, 3), beside=Epoch(1), dtype="bfloat16"),
        cluster.order(2, (0, 3), beside=Epoch(1), digest="another"),
        cluster.order(2, (0, 3), beside=Epoch(1), imports=(LayerRange(3, 4),)),
    ):
        failed = four["a"].ask(Load(0, order), LoadFailed)
        assert (failed.epoch, isinstance(failed.error, DistributedLLMError)) == (2, True)
    finish(cluster, (0, 1))


def test_no_default_of_torch_changes_while_another_stage_computes(
    llama: Path, four: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default dtype is that of all threads."""
    cluster = Cluster(llama, (), four)
    four["a"].ask(Load(0, cluster.order(1, (0, 2), dtype="bfloat16")), Loaded)
    touched: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", touched.append)
    beside = cluster.order(2, (0, 6), dtype="bfloat16", beside=Epoch(1))
    four["a"].ask(Load(0, beside), Loaded)
    assert touched == []


def test_threads_that_load_leave_the_others_their_helpers() -> None:
    told, go_on = threading.Event(), threading.Event()
    counts: list[int] = []

    def compute() -> None:
        loading.use_threads(3)
        told.set()
        go_on.wait(20)
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    assert told.wait(20)
    order: Any = None

    def make() -> Any:
        counts.append(torch.get_num_threads())
        return None

    loading.BackgroundLoad(order, make, lambda done: None).discard()
    go_on.set()
    thread.join(20)
    assert counts == [1, 3]


# ------------------------------------------------------------------ memory


def test_what_does_not_fit_beside_is_refused_before_it_is_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers("a", memory_bytes=1 << 20) as held:
        cluster = Cluster(llama, (("a", (0, 2)),), held)
        worker = held["a"]
        fits = cluster.order(2, (1, 3), beside=Epoch(1), kv_tokens=64)
        worker.ask(Load(0, fits), Loaded)
        weights = worker.engine._stages.served.stage.weight_bytes  # type: ignore[union-attr]
        read: list[Any] = []
        monkeypatch.setattr(Stage, "load", lambda *args, **kwargs: read.append(args))
        monkeypatch.setattr(
            loading, "memory_now", lambda device, budget, order: room(device, weights + 10)
        )
        failed = worker.ask(Load(0, fits), LoadFailed)
        assert isinstance(failed.error, NotEnoughMemory)
        text = str(failed.error)
        assert "No room for layers 2-3 beside layers 1-2" in text
        assert size_text(weights) in text
        assert "would be added" in text
        assert "Move fewer layers at once, raise its max_memory" in text
        assert read == []


def room(device: Any, budget_bytes: int, free_bytes: int = 1 << 36) -> loading.Memory:
    return loading.Memory(device, budget_bytes, free_bytes)


def test_both_stages_and_the_cache_that_is_held_count_without_what_they_share(
    llama: Path, four: dict[str, Worker]
) -> None:
    cluster = start(llama, four)
    cluster.begin_to_load(2, BORDERS)
    cluster.end_to_load(BORDERS)
    served: Any = four["b"].engine._stages.served
    beside: Any = four["b"].engine._stages.prepared
    stage, order, device = beside.stage, beside.order, torch.device("cpu")
    old, new, shared = served.stage.weight_bytes, stage.weight_bytes, stage.shared_weight_bytes
    assert 0 < shared < old < new
    both = old + new - shared + served.stage.kv_bytes
    many = msgspec.structs.replace(order, kv_tokens=10**9)
    alone, left = loading.admit_beside(many, stage, served, room(device, both + 1000))
    assert left == 1000
    block = 64 * stage.kv_bytes_per_token
    assert alone == (both + 1000 - new) // block * 64
    with pytest.raises(NotEnoughMemory, match="were added"):
        loading.admit_beside(many, stage, served, room(device, both - 1))
    reserve = 256 << 20
    tight = room(device, 1 << 36, reserve + 500)
    alone, left = loading.admit_beside(many, stage, served, tight)
    assert left == 500
    assert alone == (500 + old - shared + served.stage.kv_bytes) // block * 64
    with pytest.raises(NotEnoughMemory, match="were added"):
        loading.admit_beside(many, stage, served, room(device, 1 << 36, reserve - 1))


def test_what_arrives_may_take_what_is_left(
    llama: Path, four: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start(llama, four)
    admit = loading.admit_beside
    monkeypatch.setattr(
        "distributed_llm.worker.compute.held_stages.admit_beside", lambda *a: (admit(*a)[0], 5000)
    )
    cluster.begin_to_load(2, EVERYWHERE)
    cluster.end_to_load(EVERYWHERE)
    out = four["b"].ask(ExportKV(0, Epoch(2), LayerRange(2, 4), 1, False), KVExported)
    failed = four["d"].ask(carried(out), KVOrderFailed)
    assert "more than the 5000 bytes" in str(failed.error)


# ------------------------------------------------------------------ what is wrong on the way


def halved(order: ImportKV) -> ImportKV:
    (frame,) = order.frames
    half = bytes(frame)[: len(frame) // 2]
    message = msgspec.structs.replace(order.message, tensors=(TensorSpec("uint8", (len(half),)),))
    return ImportKV(0, message, (half,))


def changed(order: ImportKV, **fields: Any) -> ImportKV:
    return ImportKV(0, msgspec.structs.replace(order.message, **fields), order.frames)


def part_changed(order: ImportKV, **fields: Any) -> ImportKV:
    assert isinstance(order.message, KVPieces)
    first, *others = order.message.parts
    return changed(order, parts=(msgspec.structs.replace(first, **fields), *others))


WRONG_PIECES: dict[str, tuple[Any, str]] = {
    "half of it": (halved, "bytes, but"),
    "another layer": (lambda o: part_changed(o, layer=4), r"layer 4 is not among \[2, 3\]"),
    "a position more": (lambda o: part_changed(o, count=10**9), "bytes, but"),
    "a gap": (lambda o: part_changed(o, offset=1), "begins at 1, but 0 positions"),
    "no room": (lambda o: part_changed(o, capacity=0), "with room for 0"),
    "too much room": (lambda o: part_changed(o, capacity=2**53 - 2**53 % 64), "more than the"),
    "another transfer": (lambda o: changed(o, layers=LayerRange(2, 3)), "nobody announced"),
    "another epoch": (lambda o: changed(o, epoch=3), "no layers of plan 3"),
    "numbers": (
        lambda o: changed(o, tensors=(TensorSpec("float32", (len(o.frames[0]) // 4,)),)),
        "expected is one of uint8",
    ),
    "no frame": (lambda o: ImportKV(0, o.message, ()), "0 frames came"),
}


@pytest.fixture(scope="module")
def copying(llama: Path) -> Iterator[tuple[Cluster, ImportKV, ImportKV]]:
    """A cluster in a move of layers 2-4 from "b" to "d"; the first message of it, and the last."""
    with workers(*"abcd") as held:
        cluster = start(llama, held)
        cluster.begin_to_load(2, EVERYWHERE)
        cluster.end_to_load(EVERYWHERE)
        out = [
            held["b"].ask(ExportKV(0, Epoch(2), LayerRange(2, 4), n, True), KVExported)
            for n in (1, 2)
        ]
        pieces, end = map(carried, out)
        assert isinstance(pieces.message, KVPieces)
        assert isinstance(end.message, KVEnd)
        yield cluster, pieces, end


@pytest.mark.parametrize("name", WRONG_PIECES)
def test_wrong_pieces_are_refused(copying: tuple[Cluster, ImportKV, ImportKV], name: str) -> None:
    cluster, pieces, _ = copying
    change, said = WRONG_PIECES[name]
    order = change(pieces)
    assert re.search(said, refused(cluster.workers["d"], order))


def refused(worker: Worker, order: ImportKV) -> str:
    """Return what the worker says of an order that it cannot carry out."""
    failed = worker.ask(order, KVOrderFailed)
    assert failed.order is order
    assert failed.error.code == "stage_error"
    return str(failed.error)


def with_frame(order: ImportKV, frame: bytes) -> ImportKV:
    message = msgspec.structs.replace(order.message, tensors=(TensorSpec("uint8", (len(frame),)),))
    return ImportKV(0, message, (frame,))


def test_a_broken_end_is_refused_and_a_right_one_is_not(
    copying: tuple[Cluster, ImportKV, ImportKV],
) -> None:
    cluster, pieces, end = copying
    worker = cluster.workers["d"]
    data = bytes(end.frames[0])
    for broken, said in (
        (data[:-1], "cannot be read"),
        (data + b"\xc0", "cannot be read"),
        (b"\xc1", "cannot be read"),
        (b"\x92\x90\x91\x94\x00\x00\xcd\x40\x00\xc0", "contradicts itself"),
    ):
        assert said in refused(worker, with_frame(end, broken))
    failed = worker.ask(AssembleKV(0, Epoch(2)), KVOrderFailed)
    assert "has sent no manifest" in str(failed.error)
    worker.ask(end, KVImported)
    failed = worker.ask(AssembleKV(0, Epoch(2)), KVOrderFailed)
    assert "lacks positions 0 to" in str(failed.error)
    worker.ask(pieces, KVImported)
    worker.ask(AssembleKV(0, Epoch(2)), KVAssembled)
    assert "nobody announced" in refused(worker, pieces)


def test_only_layers_that_are_served_are_exported(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    for name, said in (("a", "a cache of layers 1-2 has no layers 3-4"), ("d", "none are served")):
        order = ExportKV(0, Epoch(2), LayerRange(2, 4), 1, False)
        failed = four[name].ask(order, KVOrderFailed)
        assert failed.order is order
        assert said in str(failed.error)
    finish(cluster, (0, 1))


def test_nothing_is_sent_twice_and_then_what_is_held(llama: Path, four: dict[str, Worker]) -> None:
    cluster = start(llama, four)
    layers = LayerRange(2, 4)

    def export(number: int, *, rest: bool = False, epoch: int = 2) -> Any:
        out = four["b"].ask(ExportKV(0, Epoch(epoch), layers, number, rest), KVExported)
        if out.message is not None:
            assert (out.message.epoch, out.message.layers) == (epoch, layers)
            assert out.message.number == number
        return out.message

    everything = export(1)
    assert isinstance(everything, KVPieces)
    assert export(2) is None
    assert export(3, epoch=3).parts == everything.parts  # another transfer
    cluster.decode(PENALTY, numbers=[1])
    added = export(2, rest=True)
    assert [(part.layer, part.count) for part in added.parts] == [(2, 1), (3, 1)]
    assert isinstance(export(3, rest=True), KVEnd)
    four["b"].engine.put(Unload(Epoch(2)))
    assert sum(part.count for part in export(1).parts) == 2 + sum(
        part.count for part in everything.parts
    )
