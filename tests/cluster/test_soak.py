"""Noise against the port of a cluster that serves."""

from pathlib import Path

import psutil

from benchmarks.soak import soak
from distributed_llm import DistributedClient, LocalCluster


def check(cluster: LocalCluster, client: DistributedClient) -> None:
    process = psutil.Process(cluster.coordinator.pid)
    before = client.status()
    soaked = soak(client, cluster.address, process, seconds=2.0, silent=20, new_tokens=30)
    assert soaked.changed == []
    assert soaked.connections.keys() == {"random_bytes", "scan", "greet", "be_silent"}
    assert all(soaked.connections.values())
    assert soaked.grown_bytes < 32 << 20
    after = client.status()
    assert [one.number for one in after.events] == [one.number for one in before.events]
    assert [worker.name for worker in after.workers] == [worker.name for worker in before.workers]


def test_noise_changes_no_token(cluster: LocalCluster, client: DistributedClient) -> None:
    check(cluster, client)


def test_noise_without_keys_changes_no_token(checkpoint: Path) -> None:
    settings = {"strategy": "memory", "insecure": True}
    with (
        LocalCluster(checkpoint, workers=1, coordinator=settings) as cluster,
        DistributedClient(cluster.address, insecure=True) as client,
    ):
        check(cluster, client)


def test_what_changes_is_noticed(cluster: LocalCluster, client: DistributedClient) -> None:
    """The positive control of this test itself."""
    process = psutil.Process(cluster.coordinator.pid)
    soaked = soak(client, cluster.address, process, seconds=0.0, silent=1, new_tokens=5)
    number, tokens = next(iter(soaked.noisy.tokens.items()))
    soaked.noisy.tokens[number] = (*tokens[:-1], tokens[-1] + 1)
    assert soaked.changed == [number]
