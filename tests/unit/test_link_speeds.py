"""What links take: as measured, and else as the others."""

import pytest

from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.partition.tables import Hop
from distributed_llm.coordinator.speeds.links import LinkSpeeds

A, B, C, D = (WorkerId(name) for name in "abcd")


def test_without_any_measurement_a_gigabit_is_assumed() -> None:
    hop = LinkSpeeds(bytes_per_token=4096).links(10).hop(A, B)
    assert hop == Hop(0.0005, pytest.approx(40960 / 100e6))  # type: ignore[arg-type]


def test_a_measured_link_takes_what_was_measured_last() -> None:
    network = LinkSpeeds(bytes_per_token=1000)
    network.observe(A, B, rtt_s=0.1, bytes_per_s=1e3)
    network.observe(A, B, rtt_s=0.02, bytes_per_s=1e6)
    assert network.links(5).hop(A, B) == Hop(0.01, 0.005)


def test_a_link_that_was_not_measured_is_as_the_others_in_the_middle() -> None:
    network = LinkSpeeds(bytes_per_token=1000)
    for sender, rtt_s, bytes_per_s in ((A, 0.02, 1e6), (B, 0.04, 2e6), (C, 2.0, 1e9)):
        network.observe(sender, D, rtt_s=rtt_s, bytes_per_s=bytes_per_s)
    assert network.links(1).hop(D, A) == Hop(0.02, 0.0005)
    assert network.links(1).hop(C, D) == Hop(1.0, 1e-6)


def test_links_of_a_worker_that_is_gone_are_forgotten() -> None:
    network = LinkSpeeds(bytes_per_token=1000)
    network.observe(A, B, rtt_s=0.02, bytes_per_s=1e6)
    network.observe(B, C, rtt_s=0.04, bytes_per_s=1e6)
    network.observe(C, D, rtt_s=0.08, bytes_per_s=1e6)
    network.forget(B)
    assert set(network.links(1).known) == {(C, D)}
