"""Workers without layers: they are measured again, and used again once that is worth it."""

import random

from distributed_llm.common.messages import Remeasured
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.fake_client import SimClient
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import World, with_settings

ROOM = 200_000
"""Memory for the whole model and the KV cache of many requests."""

LAYER_S = 0.01
FAST_LAYER_S = 0.004
PROMPT = tuple(range(9))
ANSWER = SamplingParams(max_new_tokens=100, ignore_eos=True)


def cluster() -> tuple[World, SimClient, SimWorker]:
    """Return one that serves, and the worker that is so fast that it has all layers."""
    world = World(with_settings(strategy="speed", objective="latency", replicas=1))
    for name in ("w0", "w1", "fast"):
        worker = world.worker(name, ROOM)
        worker.layer_s = FAST_LAYER_S if name == "fast" else LAYER_S
        worker.load_s = 0.3
        worker.max_positions = 500
    client = world.client()
    assert world.run(lambda: world.state == "serving")
    keep_busy(world, client, 60.0)
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
    return world.core.status(now=world.now).moves


def become(worker: SimWorker, slower: float) -> None:
    worker.layer_s = FAST_LAYER_S * slower


def left_alone(slower: float) -> tuple[World, SimClient, SimWorker]:
    """Return a cluster whose fast worker has become so much slower that it has no layers."""
    world, client, fast = cluster()
    before = moves(world)
    become(fast, slower)
    keep_busy(world, client, 20.0)
    assert "fast" not in busy(world), world.logs[-9:]
    assert moves(world) - before <= 2
    return world, client, fast


def test_a_worker_that_was_slow_for_a_while_is_taken_back() -> None:
    world, client, fast = left_alone(slower=4.0)
    keep_busy(world, client, 30.0)
    before, changed_at = moves(world), world.now
    become(fast, 1.0)
    while busy(world) != ["fast"]:
        assert world.now < changed_at + 25.0, world.logs[-9:]
        keep_busy(world, client, 1.0)
    keep_busy(world, client, 60.0)
    assert busy(world) == ["fast"]
    assert moves(world) - before <= 2
if __name__ == "__main__":
    world, client, fast = cluster()
    def show(n):
        for l in world.logs[n:]: print("   ", round(world.now,1), l)
        return len(world.logs)
    n = show(0); print(world.now, busy(world), fast.num_probes)
    become(fast, 4.0)
    for _ in range(30):
        keep_busy(world, client, 1.0); n=show(n); print(world.now, busy(world), fast.num_probes)
    become(fast, 1.0); print("FAST")
    for _ in range(40):
        keep_busy(world, client, 1.0); n=show(n); print(world.now, busy(world), fast.num_probes)
