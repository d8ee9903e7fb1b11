"""Whatever numbers a worker may report, nothing is divided by zero."""

import math

import msgspec
import pytest

from distributed_llm.common.messages import (
    Capabilities,
    LinkReport,
    Remeasured,
    StageTime,
    StageTrial,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch, LayerRange, WorkerId
from distributed_llm.coordinator.events import Received
from tests.unit.simulation import World, with_settings


def test_rates_on_the_wire_are_large_enough_to_divide_by() -> None:
    """A link of 5e-324 bytes per second took forecasts to division by zero."""
    rates = [
        (kind, field)
        for kind in (Capabilities, LinkReport, Remeasured)
        for field in msgspec.structs.fields(kind)
        if field.name.endswith("_per_s")
    ]
    assert len(rates) == 7
    for kind, field in rates:
        for rate in (5e-324, 1e-300, 0.999, math.inf, math.nan):
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert(rate, field.type)
        assert msgspec.convert(1.0, field.type) == 1.0, (kind, field.name)


@pytest.mark.parametrize("rate", [1.0, 1e12])
@pytest.mark.parametrize("rtt_s", [0.0, 5e-324, 1e9])
@pytest.mark.parametrize("bandwidth", [1.0, 1e16])
@pytest.mark.parametrize("flops", [1.0, 1e20])
@pytest.mark.parametrize("took_us", [0, 1, 2**53])
def test_whatever_a_worker_may_report_gives_forecasts(
    rate: float, rtt_s: float, bandwidth: float, flops: float, took_us: int
) -> None:
    world = World(with_settings(strategy="speed", objective="throughput"))
    workers = world.serving(2)
    for worker in workers:
        peer = worker.link.peer
        report = LinkReport(epoch=Epoch(world.epoch), up=True, rtt_s=rtt_s, bytes_per_s=rate)
        world.apply(Received(peer, report))
        probe = Remeasured(
            memory_bandwidth_bytes_per_s=bandwidth, flops_per_s=flops, memory_bytes=1 << 30
        )
        world.apply(Received(peer, probe))
    world.core._cluster.measurements.tried(
        WorkerId("w0"),
        LayerRange(0, 3),
        [
            StageTrial(
                sequences=1,
                start=0,
                num_tokens=tokens,
                time=StageTime(compute_us=took_us, layers_us=took_us, queued_us=0),
            )
            for tokens in (1, 8)
        ],
        now=world.now,
    )
    answer = world.client().submit((1, 2, 3), SamplingParams(max_new_tokens=4, ignore_eos=True))
    world.run(for_s=4.0)
    world.worker("late", 900)
    world.run(for_s=8.0)
    assert answer.end is not None
