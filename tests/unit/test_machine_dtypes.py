"""Machines without bfloat16: what they compute in, and how plans count them."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import Capabilities, ModelSource
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import DtypeName
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.model import ServedModel
from tests.checkpoints import make_checkpoint
from tests.unit.coordinator_parts import capabilities
from tests.unit.fake_model import COST, MODEL
from tests.unit.simulation import World

GIB = 1 << 30


def model(dtype: DtypeName = "bfloat16", *, large: bool = False, workspace: int = 0) -> ServedModel:
    cost = replace(COST, workspace_bytes=workspace)
    return replace(MODEL, dtype=dtype, exceeds_float16=large, cost=cost)


def machine(*, bfloat16: bool, memory_bytes: int = 8 * GIB) -> Capabilities:
    return msgspec.structs.replace(
        capabilities(memory_bytes),
        bfloat16=bfloat16,
        offload_bytes=6 * GIB,
        disk_bytes_per_s=2e9,
    )


@pytest.mark.parametrize(
    ("dtype", "large", "bfloat16", "expected"),
    [
        ("bfloat16", False, True, "bfloat16"),
        ("bfloat16", False, False, "float16"),
        ("bfloat16", True, True, "bfloat16"),
        ("bfloat16", True, False, "float32"),
        ("float16", False, False, "float16"),
        ("float32", False, False, "float32"),
        ("float32", True, False, "float32"),
    ],
)
def test_a_machine_computes_in_what_it_can(
    dtype: DtypeName, large: bool, bfloat16: bool, expected: str
) -> None:
    assert model(dtype, large=large).dtype_on(machine(bfloat16=bfloat16)) == expected


def test_float16_takes_as_much_as_bfloat16() -> None:
    served = model(workspace=GIB)
    planned = [served.planned(machine(bfloat16=able)) for able in (True, False)]
    assert planned[0] == msgspec.structs.replace(planned[1], bfloat16=True)
    assert planned[0].memory_bytes == 7 * GIB


def test_a_machine_that_computes_in_float32_counts_half() -> None:
    """8 GiB hold 2 GiB of what a step takes, and 3 GiB of bfloat16 in twice as many bytes."""
    served, found = model(large=True, workspace=GIB), machine(bfloat16=False)
    planned = served.planned(found)
    assert served.workspace_on(found) == 2 * GIB
    assert planned.memory_bytes == 3 * GIB
    assert planned.offload_bytes == 3 * GIB
    assert planned.disk_bytes_per_s == 1e9
    assert planned.memory_bandwidth_bytes_per_s == found.memory_bandwidth_bytes_per_s / 2
    assert planned.flops_per_s == found.flops_per_s
    assert served.planned(machine(bfloat16=False, memory_bytes=GIB)).memory_bytes == 0


@pytest.mark.parametrize(("device", "graphs"), [("cuda:0", 256 << 20), ("cpu", 0), ("xpu:0", 0)])
def test_a_gpu_that_records_its_steps_keeps_room_for_that(device: str, graphs: int) -> None:
    served = model(large=True, workspace=GIB)
    found = msgspec.structs.replace(machine(bfloat16=False), device=device)
    assert served.workspace_on(found) == 2 * GIB + graphs
    assert served.planned(found).memory_bytes == 3 * GIB - graphs // 2


@pytest.mark.parametrize(("large", "other"), [(False, "float16"), (True, "float32")])
def test_each_worker_is_told_its_own_dtype(large: bool, other: str) -> None:
    """One of two equal machines has no bfloat16; in float32 it gets fewer layers."""
    world = World(model=model(large=large))
    able, unable = world.worker("able", 800), world.worker("unable", 800, bfloat16=False)
    assert world.run(lambda: len(world.plan()) == 2 and world.state == "serving")
    orders = {worker.name: worker.loaded[-1] for worker in (able, unable)}
    assert {name: order.dtype for name, order in orders.items()} == {
        "able": "bfloat16",
        "unable": other,
    }
    assert {order.wire_dtype for order in orders.values()} == {MODEL.wire_dtype}
    layers = {name: len(order.layers) for name, order in orders.items()}
    assert layers["unable"] < layers["able"] if large else layers["unable"] == layers["able"]


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_models_that_exceed_float16_are_known_by_their_type(
    tmp_path: Path, model_type: str
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, model_type, num_layers=1))
    served = served_model(
        ModelSource(kind="folder", name="here"), checkpoint, CoordinatorSettings(), prints={}
    )
    assert served.exceeds_float16 == (model_type == "gemma2")
