"""Machines as people describe them, and what a coordinator would do with them."""

from dataclasses import replace
from typing import Any

import pytest

from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planning.advice import Advice
from distributed_llm.coordinator.planning.dry_run import DryRun, dry_run
from tests.unit.fake_model import MODEL

MIB = 2**20
LAYERS = 10


def model() -> ServedModel:
    """Return a model of ten layers of 1 MiB, without embedding, head or KV cache to speak of."""
    return replace(MODEL, cost=ModelCost((MIB,) * LAYERS, 0, 0, 0, (1,) * LAYERS))


def plan(*workers: str, **settings: Any) -> DryRun:
    return dry_run(model(), workers, CoordinatorSettings(**{"replicas": 1, **settings}))


def told(found: DryRun, name: str) -> Advice:
    return found.advice[WorkerId(name)]


def cuts(found: DryRun) -> list[dict[str, int]]:
    return [{stage.worker: len(stage.layers) for stage in plan} for plan in found.plans]


def test_layers_go_by_the_speeds_that_were_given() -> None:
    found = plan("pc=1GiB,30MiB/s", "mac=1GiB,20MiB/s", objective="throughput")
    assert cuts(found) == [{"pc": 6, "mac": 4}]
    # A layer takes 1/30 or 1/20 s; arithmetic, tasks and the link add 2 %.
    assert found.one_tokens_per_s == pytest.approx(1 / (6 / 30 + 4 / 20), rel=0.03)
    assert found.many_tokens_per_s > 2 * found.one_tokens_per_s
    assert told(found, "pc").text.startswith("serves 6 of 10 layers; ")
    assert found.memory == {"pc": 2**30, "mac": 2**30}


def test_the_objective_counts() -> None:
    workers = ("pc=1GiB,30MiB/s", "mac=1GiB,20MiB/s")
    assert cuts(plan(*workers, objective="latency")) == [{"pc": 10}]
    found = told(plan(*workers, objective="latency"), "mac").text
    assert found.startswith("left out: ")


def test_workers_without_speeds_are_alike() -> None:
    found = plan("8MiB", "mac=8MiB")
    assert cuts(found) == [{"worker-1": 5, "mac": 5}]
    assert found.assumed[0] == "workers that are all alike, 20 GB/s and 0.5 TFLOPS"
    assert len(plan("8MiB,1GB/s,1TFLOPS", "8MiB,2GB/s,1TFLOPS").assumed) == 1
    assert plan("8MiB,1GB/s", "8MiB,2GB/s,1TFLOPS").assumed[0].startswith("25 FLOPS per byte/s")


def test_flops_count_where_they_are_given() -> None:
    """Prompts are as long as answers: they are a matter of FLOPS."""
    slow, fast = (
        plan(f"pc=1GiB,1GB/s,{flops}").many_tokens_per_s for flops in ("1GFLOPS", "1TFLOPS")
    )
    assert fast > 5 * slow


def test_the_model_may_be_served_twice() -> None:
    found = plan("pc=12MiB,1GB/s", "mac=12MiB,1GB/s", "pi=8KiB,1GB/s", replicas=2)
    assert sorted(cuts(found), key=str) == [{"mac": 10}, {"pc": 10}]
    alone = plan("pc=12MiB,1GB/s")
    assert found.one_tokens_per_s == alone.one_tokens_per_s
    assert found.many_tokens_per_s > alone.many_tokens_per_s
    assert told(found, "pc").gain == pytest.approx(1.0)  # twice as much as the other alone
    assert "others go on without it" in told(found, "mac").text
    assert "too little memory for one layer" in told(found, "pi").text


def test_other_strategies_give_no_advice() -> None:
    for strategy, layers in (
        ("memory", {}),
        ("even", {}),
        ("custom", {"pc": LayerRange(0, 5), "mac": LayerRange(5, 10)}),
    ):
        found = plan("pc=12MiB", "mac=12MiB", strategy=strategy, layers=layers)
        assert cuts(found) == [{"pc": 5, "mac": 5}]
        assert found.advice == {}
        assert found.one_tokens_per_s > 0


def test_it_does_not_fit() -> None:
    with pytest.raises(NotEnoughMemory, match=r"are missing.*of 10 layers would fit"):
        plan("pc=4MiB,1GB/s", "mac=4MiB,1GB/s")


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (("pc=1GiB,1GB/s", "1GiB"), "--worker 1GiB: it has no speed, but pc=1GiB,1GB/s has one"),
        (("pc=1GiB", "pc=2GiB"), "--worker pc: there are two of this name"),
        (("8",), "--worker 8: 8 bytes are no machine's memory; write a unit, such as 8GiB"),
        (("1GiB", "worker-1=1GiB"), "--worker worker-1: there are two of this name"),
        (("",), "such as 512MiB, mac=2GiB or pc=8GiB,40GB/s,1.5TFLOPS"),
        (("pc=0",), "such as 512MiB"),
        (("a=b=1GiB",), "'a=b' cannot be a worker's name"),
        (("-pc=1GiB",), "'-pc' cannot be a worker's name"),
        (("pc=1GiB,1",), "not a bandwidth"),
        (("pc=1GiB,1GB/s,1",), "not a speed"),
        (("pc=1GiB,1GB/s,1TFLOPS,",), "such as 512MiB"),
    ],
)
def test_workers_that_cannot_be_read(workers: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*workers)
    assert said in str(caught.value)
