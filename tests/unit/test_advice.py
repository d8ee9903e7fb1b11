"""What people are told about their machines: true to the plans, and with the right reason."""

import time
from collections.abc import Mapping, Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.settings import Objective
from distributed_llm.common.types import WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.planning.advice import Advice, advise
from distributed_llm.coordinator.planning.forecast import best_forecast, forecast
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed
from tests.grammar import faults_of

TASK_S = 0.0005  # what a stage takes beside its layers
ONE = Demand(sequences=1, positions=0, prompt_tokens=0, chunk_tokens=1)
SIX = Demand(sequences=6, positions=0, prompt_tokens=0, chunk_tokens=1)


def model(layers: int = 10, *, ends: int = 0, kv: int = 0) -> ModelCost:
    return ModelCost((100,) * layers, ends, ends, 0, (kv,) * layers)


def machines(
    found: Mapping[str, tuple[int, float]], *, link_s: Mapping[str, float] | float = 0.005
) -> Machines:
    """Return machines with a memory in bytes and seconds per layer.

    Args:
        link_s: of every link, or of the links of some machines, where that of others is 5 ms.
    """
    names = [WorkerId(name) for name in found]
    network = LinkSpeeds(bytes_per_token=0)
    for a, b in permutations(names, 2):
        if isinstance(link_s, float):
            took = link_s
        else:
            took = max(link_s.get(a, 0.005), link_s.get(b, 0.005))
        network.observe(a, b, rtt_s=2 * took, bytes_per_s=1e9)
    return Machines(
        {WorkerId(name): size for name, (size, _) in found.items()},
        {
            WorkerId(name): WorkerSpeed(Prior(took, 0, 0, 0, 0, 0))
            for name, (_, took) in found.items()
        },
        network.links,
    )


def told(
    cost: ModelCost,
    some: Machines,
    demand: Demand = ONE,
    objective: Objective = "latency",
    kv: int = 0,
    least: int | None = None,
) -> dict[str, Advice]:
    found = advise(cost, some, demand, objective=objective, kv_tokens=kv, least_kv_tokens=least)
    assert found is not None
    return {str(worker): advice for worker, advice in found.items()}


# ------------------------------------------------------------------ numbers and reasons


def test_each_machine_is_compared_with_the_best_plan_without_it() -> None:
    some = machines({"pc": (600, 0.010), "mac": (600, 0.020), "pi": (600, 0.040)})
    found = told(model(), some)
    best = 1 / (6 * 0.010 + 4 * 0.020 + 0.005 + 2 * TASK_S)  # pc 6 layers, mac 4
    without_pc = 1 / (6 * 0.020 + 4 * 0.040 + 0.005 + 2 * TASK_S)
    with_pi = 1 / (6 * 0.010 + 3 * 0.020 + 0.040 + 2 * 0.005 + 3 * TASK_S)
    assert found["pc"].text == "serves 6 of 10 layers; 6.8 tokens/s with it, 3.5 without"
    assert found["pc"].gain == pytest.approx(best / without_pc - 1)
    assert found["pc"].with_tokens_per_s == pytest.approx(best)
    assert found["pc"].without_tokens_per_s == pytest.approx(without_pc)
    assert found["mac"].text == "serves 4 of 10 layers; 6.8 tokens/s with it, 4.4 without"
    assert found["pi"].text == (
        "left out: 5.8 tokens/s with it, 6.8 without: it takes 3.9 times as long as pc for its "
        "layers"  # (0.5 + 40) / (0.5 + 10) ms
    )
    assert found["pi"].gain == pytest.approx(with_pi / best - 1)


def test_a_link_that_is_too_slow() -> None:
    some = machines(
        {"pc": (600, 0.010), "mac": (600, 0.020), "far": (600, 0.010)}, link_s={"far": 0.050}
    )
    assert told(model(), some)["far"].text == (  # 60 + 40 + 50 ms and 2 tasks, 60 + 80 + 5 without
        "left out: 6.6 tokens/s with it, 6.8 without: its link of 50 ms costs more than its layers "
        "save"
    )


def test_any_link_may_cost_more_than_a_second_machine_saves() -> None:
    some = machines({"pc": (1000, 0.020), "mac": (200, 0.010)}, link_s=0.030)
    assert told(model(), some)["mac"].text == (  # 8 * 20 + 2 * 10 + 30 + 1 ms, or 200.5
        "left out: 4.7 tokens/s with it, 5.0 without: its link of 30 ms costs more than its layers "
        "save"
    )


def test_a_link_and_a_speed_that_are_too_slow_only_together() -> None:
    some = machines(
        {"pc": (600, 0.010), "mac": (600, 0.020), "far": (600, 0.020)}, link_s={"far": 0.050}
    )
    assert told(model(), some)["far"].text.endswith(
        "its link of 50 ms costs time, and it takes 2.0 times as long as pc for its layers"
    )  # (0.5 + 80) / (0.5 + 40) ms


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((1000, 90), "pc alone"),
        ((500, 500), "mac and pc alone"),
        ((400, 300, 300), "mac, nas and pc alone"),
        ((300, 300, 300, 200), "4 others"),
    ],
)
def test_a_machine_as_good_as_the_others_but_one_too_many(sizes: Sequence[int], names: str) -> None:
    used = dict(zip(["pc", "mac", "nas", "old"], ((size, 0.01) for size in sizes), strict=False))
    some = machines({**used, "new": (200, 0.0101)})
    assert told(model(), some)["new"].text.endswith(f"without: the model runs fastest on {names}")


def test_a_machine_that_the_model_does_not_fit_without() -> None:
    found = told(model(), machines({"pc": (700, 0.010), "mac": (600, 0.020)}))
    assert (found["pc"].gain, found["pc"].without_tokens_per_s) == (None, None)
    assert found["pc"].text == ("needed: without it the model does not fit (400 bytes are missing)")
    assert found["mac"].text.endswith("(300 bytes are missing)")


def test_a_machine_without_which_there_is_memory_but_in_pieces() -> None:
    some = machines({"pc": (560, 0.01), "mac": (460, 0.01), "old": (100, 0.01)})
    assert told(model(), some)["old"].text == (
        "needed: without it the model does not fit (the other machines' memory is in pieces into "
        "which whole layers do not fit)"
    )


def test_a_machine_with_too_little_memory() -> None:
    some = machines({"pc": (2000, 0.010), "pi": (119, 0.010)})
    (pi,) = (told(model(kv=2), some, kv=10)[name] for name in ["pi"])
    assert (
        pi.text == "left out: too little memory for one layer (120 bytes needed, 119 bytes offered)"
    )
    assert pi.gain == 0.0


def test_a_machine_that_holds_a_layer_but_neither_embedding_nor_head() -> None:
    some = machines({"pc": (2000, 0.010), "pi": (149, 0.001)})
    assert told(model(ends=50), some)["pi"].text == (
        "left out: its 149 bytes do not hold the layers that it would get"
    )


def test_without_a_machine_less_room_for_kv_cache_may_do() -> None:
    some = machines({"pc": (1100, 0.010), "mac": (900, 0.005)})
    strict = told(model(kv=1), some, kv=20)
    assert strict["mac"].gain is None
    assert strict["mac"].text.endswith("(100 bytes are missing)")
    found = told(model(kv=1), some, kv=20, least=10)
    assert found["mac"].text == (  # mac 7 layers, pc 3: 71 ms; pc alone 100.5 ms
        "serves 7 of 10 layers; 14.1 tokens/s with it, 10.0 without, and less room for KV cache"
    )


def test_other_pipelines_serve_the_model_too() -> None:
    some = machines({"pc": (1000, 0.010), "mac": (90, 0.010)})
    alone, beside = 1 / 0.1005, 5.0
    found = advise(model(), some, ONE, objective="latency", kv_tokens=0, beside_tokens_per_s=beside)
    assert found is not None
    pc, mac = found.values()
    assert (
        pc.text
        == "serves all 10 layers; 15.0 tokens/s with it, 5.0 without (others go on without it)"
    )
    assert pc.with_tokens_per_s == pytest.approx(alone + 5)
    assert pc.without_tokens_per_s == 5.0
    assert pc.gain == pytest.approx(alone / beside)
    assert mac.gain == 0.0
    assert mac.with_tokens_per_s == pytest.approx(alone + 5)


def test_nothing_fits_at_all() -> None:
    assert (
        advise(model(), machines({"pc": (999, 0.01)}), ONE, objective="auto", kv_tokens=0) is None
    )
    assert advise(model(), machines({}), ONE, objective="auto", kv_tokens=0) is None


def test_one_machine_alone_is_needed() -> None:
    (pc,) = told(model(), machines({"pc": (1000, 0.01)})).values()
    assert pc.text == "needed: it serves the model alone"


def test_throughput_is_that_of_a_full_pipeline() -> None:
    some = machines({"pc": (1000, 0.010), "mac": (1000, 0.010), "pi": (1000, 0.090)})
    found = told(model(), some, SIX, "throughput")
    full = 2 / (5 * 0.010 + TASK_S)  # two sequences in a step, five layers in a stage
    assert found["pc"].with_tokens_per_s == pytest.approx(full)
    assert found["pc"].text == "serves 5 of 10 layers; 39.6 tokens/s with it, 22.1 without"
    assert found["pi"].text.startswith("left out: 22.1 tokens/s with it, 39.6 without: it takes ")


def test_gains_follow_the_demand() -> None:
    """A second machine helps many sequences, and one sequence not at all."""
    some = machines({"pc": (1000, 0.001), "mac": (1000, 0.001)}, link_s=0.002)
    speeds = {name: WorkerSpeed(Prior(0.001, 0.001, 0, 0, 0, 0)) for name in some.speeds}
    some = Machines(some.memory_bytes, speeds, some.links)
    gains = {
        demand: [one.gain or 0.0 for one in told(model(), some, demand, "auto").values()]
        for demand in (ONE, SIX)
    }
    assert max(gains[ONE]) < 0.001
    assert min(gains[SIX]) > 0.2


# ------------------------------------------------------------------ true to the plans

specs = st.tuples(st.integers(50, 700), st.floats(0.001, 0.1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    found=st.lists(specs, min_size=1, max_size=4),
    link_s=st.lists(st.floats(0.0, 0.1), min_size=4, max_size=4),
    ends=st.integers(0, 80),
    sequences=st.integers(1, 9),
    objective=st.sampled_from(["auto", "throughput", "latency"]),
    kv=st.integers(0, 20),
)
def test_advice_agrees_with_the_plans(
    found: list[tuple[int, float]],
    link_s: list[float],
    ends: int,
    sequences: int,
    objective: Objective,
    kv: int,
) -> None:
    cost = model(6, ends=ends, kv=1)
    names = [WorkerId(f"w{i}") for i in range(len(found))]
    some = machines(
        dict(zip(names, found, strict=True)), link_s=dict(zip(names, link_s, strict=False))
    )
    demand = Demand(sequences, positions=0, prompt_tokens=0, chunk_tokens=1)
    best = best_forecast(cost, some, demand, objective=objective, kv_tokens=kv)
    advices = advise(cost, some, demand, objective=objective, kv_tokens=kv)
    if best is None:
        assert advices is None
        return
    assert advices is not None
    assert set(advices) == set(names)
    for name, advice in advices.items():
        rest = some.subset([other for other in names if other != name])
        without = best_forecast(cost, rest, demand, objective=objective, kv_tokens=kv)
        assert (advice.gain is None) == (without is None)
        assert (advice.without_tokens_per_s is None) == (without is None)
        if name not in dict(best.partition.layer_map):
            assert advice.gain is not None
            assert -1 < advice.gain <= 0
            assert advice.text.startswith("left out: ")
            assert advice.without_tokens_per_s == pytest.approx(
                next(iter(advices.values())).with_tokens_per_s
            )
        elif without is None:
            assert advice.text.startswith("needed: ")
        else:
            held = len(dict(best.partition.layer_map)[name])
            share = f"{held} of 6 layers" if held < 6 else "all 6 layers"
            assert advice.text.startswith(f"serves {share}; ")
            if objective == "auto":
                layer_map = without.partition.layer_map
                expected = forecast(cost, rest, layer_map, demand).tokens_per_s
                assert advice.with_tokens_per_s == best.tokens_per_s
                assert advice.without_tokens_per_s == pytest.approx(expected)
            else:  # the best of all is not worse than the best of some
                assert advice.gain is not None
                assert advice.gain >= -1e-6
        assert faults_of(advice.text) == []
        if advice.gain is not None and advice.without_tokens_per_s is not None:
            ratio = advice.with_tokens_per_s / advice.without_tokens_per_s
            assert advice.gain == pytest.approx(ratio - 1)


# ------------------------------------------------------------------ many machines


def crowd(count: int) -> Machines:
    speeds = {f"w{i}": (300 + 10 * (i % 7), 0.01 * (1 + i % 5)) for i in range(count)}
    return machines(speeds, link_s={f"w{i}": 0.001 * (1 + i % 9) for i in range(count)})


def test_where_plans_keep_their_order_the_numbers_are_nearly_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = told(model(), crowd(7))
    monkeypatch.setattr("distributed_llm.coordinator.planning.advice._EXACT_ADDITIONS", 0)
    quick = told(model(), crowd(7))
    for name, advice in exact.items():
        assert advice.without_tokens_per_s is not None
        assert quick[name].without_tokens_per_s == pytest.approx(
            advice.without_tokens_per_s, rel=0.05
        )


def test_where_plans_keep_their_order_others_step_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_llm.coordinator.planning.advice._EXACT_ADDITIONS", 0)
    some = machines({"pc": (200, 0.010), "mac": (200, 0.014), "pi": (200, 0.016)})
    found = told(model(2), some, ONE, "throughput")
    assert found["pc"].with_tokens_per_s == pytest.approx(1 / 0.0145)
    assert found["pc"].without_tokens_per_s == pytest.approx(1 / 0.0165)


def test_of_very_many_machines_those_of_the_plan_come_first() -> None:
    workers = {f"w{i}": (300, 0.01 * (1 + i % 5)) for i in range(1000)}
    names = [WorkerId(name) for name in workers]
    some = Machines(
        dict.fromkeys(names, 300),
        {
            WorkerId(name): WorkerSpeed(Prior(took, 0, 0, 0, 0, 0))
            for name, (_, took) in workers.items()
        },
        LinkSpeeds(bytes_per_token=0).links,
    )
    begun = time.perf_counter()
    found = told(model(22), some)
    assert time.perf_counter() - begun < 10  # 0.2 s on a quiet machine
    best = best_forecast(model(22), some, ONE, objective="latency", kv_tokens=0)
    assert best is not None
    used = [worker for worker, _ in best.partition.layer_map]
    assert list(found)[: len(used)] == used
    assert len(used) < len(found) <= 32
    quick = {name for name, (_, took) in workers.items() if took == 0.01}
    assert set(found) <= quick
