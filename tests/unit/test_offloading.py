"""Layers that fit into no memory stay on disks: only then, as few as possible, and it is said."""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch

from distributed_llm import summary
from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.messages import Capabilities, LoadStage, PipelineStatus
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.events import Log, Send
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.search import predict
from distributed_llm.coordinator.partition.tables import make_tables
from distributed_llm.coordinator.plan import Plan
from distributed_llm.coordinator.planning.dry_run import dry_run
from distributed_llm.coordinator.speeds.machines import Machines, Overflow
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.worker import devices, work
from distributed_llm.worker.compute.copies import measure_copies
from distributed_llm.worker.compute.disk import measure_disk
from tests.made_up_copies import MadeUpCopies
from tests.unit.coordinator_parts import Parts, capabilities
from tests.unit.fake_model import MODEL
from tests.unit.test_planner import COST, LAYER_S, machines, planner
from tests.wire.test_status_command import status
from tests.wire.test_status_command import worker as worker_status

TOKENS = 64
"""Positions of KV cache that `planner` leaves room for; one takes a byte in each layer."""
WHOLE = COST.all_weight_bytes + 6 * TOKENS
MIB = 1 << 20


def with_disks(memory: Mapping[str, int], rate: float = 1e6, **rooms: int) -> Machines:
    """Return machines, some with room on their disks."""
    overflows = {WorkerId(name): Overflow(room, rate) for name, room in rooms.items()}
    return replace(machines(memory), overflows=overflows)


def on_disk(plan: Plan) -> list[tuple[str, int]]:
    """Return how many layers each worker reads from its disk."""
    return [(stage.worker, stage.from_disk) for stage in plan]


@pytest.mark.parametrize("strategy", ["speed", "memory", "even"])
def test_disks_are_used_only_if_it_does_not_fit_otherwise(strategy: str) -> None:
    some = planner(strategy=strategy)
    assert on_disk(some.plan(with_disks({"a": WHOLE}, a=99_999))) == [("a", 0)]
    (stage,) = some.plan(with_disks({"a": WHOLE - 1}, a=99_999))
    # One more than are in memory at a time, or nothing would be saved.
    assert (stage.from_disk, stage.disk_bytes) == (3, 3000)
    assert stage.weight_bytes == COST.all_weight_bytes - 1000
    assert stage.kv_tokens == (WHOLE - 1 - stage.weight_bytes) // 6
    with pytest.raises(NotEnoughMemory):
        some.plan(with_disks({"a": WHOLE - 1}))


def test_what_must_be_in_memory_has_room() -> None:
    ends, two, context = 800, 2000, 6 * TOKENS
    (stage,) = planner().plan(with_disks({"a": ends + two + context}, a=99_999))
    assert (stage.from_disk, stage.kv_tokens) == (6, TOKENS)
    with pytest.raises(NotEnoughMemory, match="are missing"):
        planner().plan(with_disks({"a": ends + two + context - 6}, a=99_999))


def test_no_more_is_on_a_disk_than_it_has_room_for() -> None:
    memory = {"a": WHOLE - 1500}
    assert planner().plan(with_disks(memory, a=1500))[0].from_disk == 4
    with pytest.raises(NotEnoughMemory):
        planner().plan(with_disks(memory, a=1499))


def test_weights_shrink_before_they_go_to_a_disk() -> None:
    small = replace(COST, layer_bytes=(500,) * 6, quantize="int4")
    auto = planner(smaller=(small,), may_shrink=True)
    assert [(s.quantize, s.from_disk) for s in auto.plan(with_disks({"a": 5000}, a=9999))] == [
        ("int4", 0)
    ]
    assert [(s.quantize, s.from_disk) for s in auto.plan(with_disks({"a": 3500}, a=9999))] == [
        ("int4", 4)
    ]
    more = auto.more_than("int4")  # bits come back where there is memory for them, else never
    for alone in (auto.only("none"), more):
        assert alone is not None
        with pytest.raises(NotEnoughMemory):
            alone.plan(with_disks({"a": 5000}, a=9999))
    fixed = planner(smaller=(small,))
    assert fixed.plan(with_disks({"a": 5000}, a=9999))[0].quantize == "none"


def test_the_forecast_counts_what_is_read() -> None:
    made, some = planner(), with_disks({"a": WHOLE - 1000}, rate=1e6, a=99_999)
    assert made.machines_of([made.plan(machines({"a": WHOLE}))], some) is some
    used = made.machines_of([made.plan(some)], some)
    candidates = used.candidates(Work(tokens=1.0))
    links = used.links(1.0)
    layer_map = ((WorkerId("a"), LayerRange(0, 6)),)
    told = predict(COST, candidates, links, layer_map).total_s
    plain = predict(COST, some.candidates(Work(tokens=1.0)), links, layer_map).total_s
    assert plain == pytest.approx(6 * LAYER_S, rel=0.1)
    missing = COST.all_weight_bytes - (WHOLE - 1000)
    assert told - plain == pytest.approx((missing + 2000) / 1e6)
    table = make_tables(COST, candidates, links, TOKENS).stages[0]
    assert table[0, 6] - plain == pytest.approx((1000 + 2000) / 1e6)
    assert table[1, 3] < 3 * LAYER_S  # fits


def test_what_a_step_takes_is_not_planned_with() -> None:
    """Two machines of 700 MiB hold ten layers of 100 MiB, but not if a step takes 250 of each."""
    cost = ModelCost((100 * MIB,) * 10, 0, 0, 0, (1,) * 10, workspace_bytes=150 * MIB)
    settings = CoordinatorSettings(replicas=1)
    workers = ["a=700MiB", "b=700MiB"]
    run = dry_run(replace(MODEL, cost=cost, smaller=()), workers, settings)
    assert [len(stage.layers) for stage in run.plans[0]] == [5, 5]
    assert run.memory == {"a": 700 * MIB, "b": 700 * MIB}
    said = "memory: 150.0 MiB of each machine are kept for what it computes with"
    assert said in summary.plan_lines(run)
    more = replace(MODEL, cost=replace(cost, workspace_bytes=250 * MIB), smaller=())
    with pytest.raises(NotEnoughMemory, match=r"beside 250\.0 MiB each"):
        dry_run(more, workers, settings)


def test_a_dry_run_says_what_is_read() -> None:
    model = replace(MODEL, cost=ModelCost((100 * MIB,) * 10, 0, 0, 0, (1,) * 10), smaller=())
    settings = CoordinatorSettings(replicas=1)
    run = dry_run(model, ["old=700MiB+1GiB"], settings)
    read_s = run.plans[0][0].disk_bytes / 1e9
    assert run.one_tokens_per_s == pytest.approx(1 / read_s, rel=0.2)
    said = "old: 600.0 MiB of 1000.0 MiB fit into no memory and are read from its disk for every"
    assert any(line.startswith(said) for line in summary.plan_lines(run))
    assert run.memory == {"old": 700 * MIB}
    assert "disks of 1 GB/s" in run.assumed[-1]
    quick = dry_run(model, ["old=1GiB+1GiB"], settings)
    assert quick.plans[0][0].from_disk == 0
    assert quick.one_tokens_per_s > 5 * run.one_tokens_per_s


# ------------------------------------------------------------------ beside a GPU


def beside(memory: int, ram: int, disk: int = 0) -> Machines:
    """Return a GPU of so much memory, with room in the memory of its machine and on its disk."""
    own = Overflow(ram + disk, 1e6, ram, 1e7)
    return replace(machines({"a": memory}), overflows={WorkerId("a"): own})


def test_layers_stay_in_memory_beside_a_gpu_before_they_go_to_a_disk() -> None:
    """Three more have to be there than would be missing: two on their way, one in part."""
    some, gpu = planner(), WHOLE - 1500
    (stage,) = some.plan(beside(gpu, ram=9999))
    assert (stage.from_ram, stage.from_disk) == (4, 0)
    assert (stage.ram_bytes, stage.disk_bytes) == (4000, 0)
    assert stage.weight_bytes == COST.all_weight_bytes - 2000
    (stage,) = some.plan(beside(gpu, ram=2500, disk=9999))
    assert (stage.from_ram, stage.from_disk) == (2, 2)
    assert (stage.ram_bytes, stage.disk_bytes) == (2000, 2000)
    assert some.plan(beside(WHOLE, ram=9999))[0].is_away is False


@pytest.mark.parametrize("missing", [1, 999, 1000, 1001, 2500, 3900])
@pytest.mark.parametrize("ram", [0, 1000, 3500, 5000, 8000])
def test_nothing_goes_to_a_disk_that_is_not_offered(missing: int, ram: int) -> None:
    try:
        (stage,) = planner().plan(beside(WHOLE - missing, ram=ram))
    except NotEnoughMemory:
        assert ram < missing + 3000 or missing > 3000
        return
    assert stage.from_disk == 0
    assert stage.ram_bytes <= ram


def test_the_forecast_counts_what_is_copied_at_the_rate_of_the_copies() -> None:
    made, some = planner(), beside(WHOLE - 1000, ram=2500, disk=99_999)
    used = made.machines_of([made.plan(some)], some)
    candidates, links = used.candidates(Work(tokens=1.0)), used.links(1.0)
    told = predict(COST, candidates, links, ((WorkerId("a"), LayerRange(0, 6)),)).total_s
    plain = predict(
        COST, some.candidates(Work(tokens=1.0)), links, ((WorkerId("a"), LayerRange(0, 6)),)
    ).total_s
    away = COST.all_weight_bytes - (WHOLE - 1000) + 2000
    assert told - plain == pytest.approx(2500 / 1e7 + (away - 2500) / 1e6)
    table = make_tables(COST, candidates, links, TOKENS).stages[0]
    assert table[0, 6] - plain == pytest.approx(2500 / 1e7 + (1000 + 2000 - 2500) / 1e6)


def test_what_a_machine_offers() -> None:
    machine = capabilities(1 << 30)
    assert Overflow.of(machine) is None
    more = partial(msgspec.structs.replace, machine)
    disk = more(offload_bytes=9, disk_bytes_per_s=1e9)
    assert Overflow.of(disk) == Overflow(9, 1e9)
    ram = more(offload_bytes=9, ram_bytes=9, ram_bytes_per_s=2e10)
    assert Overflow.of(ram) == Overflow(9, 2e10, 9, 2e10)
    both = more(offload_bytes=9, disk_bytes_per_s=1e9, ram_bytes=5, ram_bytes_per_s=2e10)
    assert Overflow.of(both) == Overflow(9, 1e9, 5, 2e10)


def test_a_dry_run_says_what_is_copied() -> None:
    model = replace(MODEL, cost=ModelCost((25 * MIB,) * 40, 0, 0, 0, (1,) * 40), smaller=())
    settings = CoordinatorSettings(replicas=1)
    run = dry_run(model, ["gpu=700MiB+ram:210MiB+1GiB"], settings)
    (stage,) = run.plans[0]
    assert (stage.from_ram, stage.from_disk) == (8, 7)
    taken = stage.ram_bytes / 12e9 + stage.disk_bytes / 1e9
    assert run.one_tokens_per_s == pytest.approx(1 / taken, rel=0.2)
    assert "GPUs that are sent 12 GB/s, disks of 1 GB/s" in run.assumed[-1]
    texts = summary.plan_lines(run)
    for said in (
        "gpu: 200.0 MiB of 1000.0 MiB do not fit on its GPU and are copied there from memory for",
        "gpu: 175.0 MiB of 1000.0 MiB fit into no memory and are read from its disk for every",
    ):
        assert any(line.startswith(said) for line in texts)
    alone = dry_run(model, ["gpu=700MiB+ram:900MiB"], settings)
    assert (alone.plans[0][0].from_ram, alone.plans[0][0].from_disk) == (15, 0)
    assert alone.one_tokens_per_s > 2 * run.one_tokens_per_s
    assert alone.assumed[-1].endswith("sent 12 GB/s")


# ------------------------------------------------------------------ workers


def test_a_disk_is_measured_in_a_file_that_goes(tmp_path: Path) -> None:
    assert measure_disk(tmp_path / "new", 1000, read_bytes=1 << 16) > 1000
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_with_too_little_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10 * MIB))
    with pytest.raises(ConfigError, match=r"offload is 20.0 MiB, but .* has 10.0 MiB free"):
        measure_disk(tmp_path, 20 * MIB)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used: "):
        measure_disk(tmp_path / "file", 0)


def on_device(device: str) -> Capabilities:
    return msgspec.structs.replace(capabilities(1 << 30), device=device)


def test_workers_are_told_and_people_too() -> None:
    parts = Parts({"a": 9000, "b": 9000})
    worker = parts.worker("b")
    worker.capabilities = msgspec.structs.replace(
        worker.capabilities, offload_bytes=9999, disk_bytes_per_s=1000.0
    )
    plan = parts.plan(("a", 0, 2), ("b", 2, parts.cost.num_layers))
    plan = (plan[0], replace(plan[1], from_disk=1, disk_bytes=500))
    actions = parts.pipelines.load([plan])
    messages = [action.message for action in actions if isinstance(action, Send)]
    orders = [message for message in messages if isinstance(message, LoadStage)]
    assert {order.layers.start: order.from_disk for order in orders} == {0: 0, 2: 1}
    texts = [action.text for action in actions if isinstance(action, Log)]
    assert any("500 bytes of its weights stay on the disk of b and" in text for text in texts), (
        texts
    )


def test_workers_with_gpus_are_told_what_stays_beside_them() -> None:
    parts = Parts({"a": 9000})
    worker = parts.worker("a")
    worker.capabilities = msgspec.structs.replace(
        worker.capabilities,
        offload_bytes=9999,
        disk_bytes_per_s=1000.0,
        ram_bytes=1000,
        ram_bytes_per_s=4000.0,
    )
    (stage,) = parts.plan(("a", 0, parts.cost.num_layers))
    stage = replace(stage, from_disk=1, disk_bytes=500, from_ram=2, ram_bytes=1000)
    actions = parts.pipelines.load([(stage,)])
    messages = [action.message for action in actions if isinstance(action, Send)]
    (order,) = [message for message in messages if isinstance(message, LoadStage)]
    assert (order.from_disk, order.from_ram) == (1, 2)
    assert parts.pipelines.away_s(worker) == pytest.approx(1000 / 4000 + 500 / 1000)
    texts = [action.text for action in actions if isinstance(action, Log)]
    for said in (
        "1,000 bytes of its weights stay in the memory of the machines of a and are copied in "
        "every step, which takes about 250 ms",
        "500 bytes of its weights stay on the disk of a and are read in every step, which takes "
        "about 500 ms",
    ):
        assert any(said in text for text in texts), texts


def test_status_says_what_is_read() -> None:
    pipeline = PipelineStatus(
        epoch=Epoch(3),
        lineage=Epoch(3),
        disk_bytes=3 * MIB,
        ram_bytes=5 * MIB,
        state="serving",
        stages=(),
        links=(),
        kv_tokens=65_536,
    )
    shown = status(worker_status("a", layers=LayerRange(0, 36)), pipelines=(pipeline,))
    for said in (
        "; 3.0 MiB of weights are read from disks for every token;",
        "; 5.0 MiB of weights are copied to GPUs for every token;",
    ):
        assert said in summary.headline(shown)


def test_a_cpu_offers_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "measure_disk", lambda folder, wanted: 5e8)
    found = work._with_offload(on_device("cpu"), 3 * MIB)
    assert (found.offload_bytes, found.disk_bytes_per_s) == (3 * MIB, 5e8)
    assert (found.ram_bytes, found.ram_bytes_per_s) == (0, None)
    with pytest.raises(ConfigError, match="computes on mps, which is not sent weights"):
        work._with_offload(on_device("mps"), 3 * MIB)


@pytest.mark.parametrize(
    ("gpus", "free", "in_ram", "disk"), [(1, 4, 3, None), (1, 2, 2, 1), (2, 4, 2, 1)]
)
def test_a_gpu_offers_the_memory_of_its_machine_then_the_disk(
    gpus: int, free: int, in_ram: int, disk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several, each offers a part of the memory, for there is a worker for each."""
    present = [*(f"cuda:{number}" for number in range(gpus)), "cpu"]
    monkeypatch.setattr(devices, "present", lambda: present)
    measured: list[int] = []

    def measure(folder: Path, wanted: int) -> float:
        measured.append(wanted)
        return 5e8

    monkeypatch.setattr(work, "copies_to", lambda device: MadeUpCopies())
    monkeypatch.setattr(work, "measure_copies", lambda copies, device: 2e10)
    monkeypatch.setattr(work, "usable_memory_bytes", lambda device: free * MIB)
    monkeypatch.setattr(work, "measure_disk", measure)
    found = work._with_offload(on_device("cuda:0"), 3 * MIB)
    assert (found.offload_bytes, found.ram_bytes, found.ram_bytes_per_s) == (
        *(3 * MIB, in_ram * MIB),
        2e10,
    )
    assert measured == ([] if disk is None else [disk * MIB])
    assert found.disk_bytes_per_s == (None if disk is None else 5e8)


def test_copies_are_measured_out_of_locked_memory() -> None:
    copies = MadeUpCopies()
    assert measure_copies(copies, torch.device("cpu"), copied_bytes=1 << 16) > 1 << 16
    assert copies.locked == set()
    assert len(copies.log) == 10  # a wait for each of five copies
