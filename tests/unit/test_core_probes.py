"""Workers without layers: they are measured again, and used again once that is worth it."""

import random

import pytest

from distributed_llm.common.messages import Refused, Remeasured
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.coordinator import events
from tests.unit.fake_client import SimClient
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import Fault, FaultKind, World, with_settings

ROOM = 200_000
"""Memory for the whole model, so that one worker may have all layers, and much KV cache."""

LAYER_S = 0.04
FAST_LAYER_S = 0.016
SLOW_LAYER_S = 4 * FAST_LAYER_S
PROMPT = tuple(range(9))
ANSWER = SamplingParams(max_new_tokens=100, ignore_eos=True)


def cluster() -> tuple[World, SimClient, SimWorker]:
    """Return one that serves, and the worker that is so fast that it has all layers."""
    world = World(with_settings(strategy="speed", objective="latency", replicas=1))
    for name in ("w0", "w1", "fast"):
        worker = world.worker(name, ROOM)
        worker.layer_s = FAST_LAYER_S if name == "fast" else LAYER_S
        worker.base_s = worker.layer_s
        worker.load_s = 0.3
        worker.max_positions = 500
    client = world.client()
    assert world.run(lambda: world.state == "serving")
    keep_busy(world, client, 30.0)
    assert busy(world) == ["fast"], world.logs
    return world, client, worker


def keep_busy(world: World, client: SimClient, for_s: float) -> None:
    """Let so much time pass in which a request is always under way."""
    until = world.now + for_s
    while world.now < until:
        if world.all_ended():
            client.submit(PROMPT, ANSWER)
        world.run(world.all_ended, for_s=until - world.now)


def busy(world: World) -> list[str]:
    """Return who has layers."""
    return sorted(w.name for w in world.core.status(now=world.now).workers if w.layers)


def moves(world: World) -> int:
    return world.core._moves.num_moves


def left_alone() -> tuple[World, SimClient, SimWorker]:
    """Return a cluster whose fast worker has become so much slower that it has no layers."""
    world, client, fast = cluster()
    before = moves(world)
    fast.layer_s = SLOW_LAYER_S
    keep_busy(world, client, 20.0)
    assert "fast" not in busy(world), world.logs[-9:]
    assert moves(world) - before <= 2
    return world, client, fast


@pytest.mark.parametrize("after_s", [0.5, 4.0, 8.0, 60.0])
def test_a_worker_that_was_slow_for_a_while_is_taken_back(after_s: float) -> None:
    world, client, fast = left_alone()
    keep_busy(world, client, after_s)
    before, changed_at = moves(world), world.now
    fast.layer_s = FAST_LAYER_S
    while busy(world) != ["fast"]:
        assert world.now < changed_at + 25.0, world.logs[-9:]
        keep_busy(world, client, 1.0)
    keep_busy(world, client, 30.0)
    assert busy(world) == ["fast"]
    assert moves(world) - before <= 2


@pytest.mark.parametrize(("noise", "seed"), [(0.0, 0), (0.2, 0), (0.2, 1)])
def test_a_worker_that_stays_slow_is_left_alone(noise: float, seed: int) -> None:
    world, client, fast = left_alone()
    draw, before = random.Random(seed), moves(world)
    fast.probe_noise = lambda: 1.0 + draw.uniform(-noise, noise)
    probes = fast.num_probes
    keep_busy(world, client, 120.0)
    assert fast.num_probes - probes == pytest.approx(12, abs=1)
    assert moves(world) == before
    assert "fast" not in busy(world)


def test_noisy_probes_of_a_worker_that_is_as_fast_as_the_others_move_nothing() -> None:
    world, client, fast = cluster()
    draw = random.Random(0)
    idle = [worker for worker in world.workers if worker is not fast]
    for worker in idle:
        worker.probe_noise = lambda: 1.0 + draw.uniform(-0.2, 0.2)
    fast.layer_s = LAYER_S
    keep_busy(world, client, 60.0)
    before = moves(world)
    keep_busy(world, client, 120.0)
    assert moves(world) == before


def test_a_worker_that_becomes_slow_while_it_is_idle_is_not_taken() -> None:
    world, client, fast = cluster()
    for worker in world.workers:
        if worker is not fast:
            worker.layer_s = 10 * LAYER_S
    keep_busy(world, client, 30.0)
    before = moves(world)
    fast.layer_s = SLOW_LAYER_S
    keep_busy(world, client, 60.0)
    assert busy(world) == ["fast"], world.logs[-9:]
    assert moves(world) == before


def test_status_tells_what_was_measured_last() -> None:
    world, client, fast = left_alone()
    keep_busy(world, client, 20.0)
    assert bandwidth(world) == pytest.approx(1e9 * FAST_LAYER_S / SLOW_LAYER_S)
    fast.layer_s = FAST_LAYER_S
    keep_busy(world, client, 10.0)
    assert bandwidth(world) == pytest.approx(1e9)


def bandwidth(world: World) -> float:
    """Return how fast the fast worker reads, bytes/s."""
    workers = {worker.name: worker for worker in world.core.status(now=world.now).workers}
    return workers["fast"].capabilities.memory_bandwidth_bytes_per_s


@pytest.mark.parametrize("what", ["drop", "duplicate"])
def test_probes_that_are_lost_or_repeated_do_no_harm(what: FaultKind) -> None:
    world, client, fast = left_alone()
    world.faults.append(Fault(Remeasured, what, 2, fast))
    keep_busy(world, client, 30.0)
    assert not world.faults
    before = moves(world)
    fast.layer_s = FAST_LAYER_S
    keep_busy(world, client, 30.0)
    assert busy(world) == ["fast"]
    assert moves(world) - before <= 2


def test_a_stranger_is_not_believed() -> None:
    world, _, fast = cluster()
    fast.kill()
    world.run(for_s=5.0)
    found = Remeasured(memory_bandwidth_bytes_per_s=1e12, flops_per_s=1e12, memory_bytes=1)
    actions = world.apply(events.Received(fast.link.peer, found))
    assert [type(a.message) for a in actions if isinstance(a, events.Send)] == [Refused]
