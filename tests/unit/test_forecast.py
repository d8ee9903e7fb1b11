"""What plans are expected to give, and which is the best under a load."""

from dataclasses import replace
from itertools import permutations

import pytest

from distributed_llm.common.settings import Objective
from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap
from distributed_llm.coordinator.planning.forecast import best_forecast, forecast, score
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed

LAYERS = 14
MODEL = ModelCost(
    layer_bytes=(100,) * LAYERS,
    first_bytes=0,
    last_bytes=0,
    shared_bytes=0,
    layer_kv_bytes=(0,) * LAYERS,
)
ROOMY = 100 * LAYERS
ALONE = Demand(sequences=1, positions=100, prompt_tokens=0, chunk_tokens=1)
CROWD = Demand(sequences=60, positions=100, prompt_tokens=0, chunk_tokens=1)


def machine(layer_s: float, token_s: float = 0.0) -> WorkerSpeed:
    """Return a machine whose layers take so long, and longer for each token."""
    speeds = WorkerSpeed(Prior(layer_s, token_s, 0.0, 0.0, 0.0, 0.0))
    for at in range(200):  # long enough for what it takes to be known well
        tokens = 1 + at % 16
        speeds.observe(
            Work(tokens, 0.0),
            layers=4.0,
            is_last=False,
            layers_s=4.0 * (layer_s + token_s * tokens),
            other_s=0.0,
            now=0.1 * at,
        )
    return speeds


def cluster(*speeds: WorkerSpeed, memory_bytes: int = ROOMY, rtt_s: float = 0.0) -> Machines:
    names = [WorkerId(f"w{i}") for i in range(len(speeds))]
    network = LinkSpeeds(bytes_per_token=1000)
    for pair in permutations(names, 2):
        network.observe(*pair, rtt_s=rtt_s, bytes_per_s=1e9)
    return Machines(
        dict.fromkeys(names, memory_bytes), dict(zip(names, speeds, strict=True)), network.links
    )


def layer_map(*stops: int) -> LayerMap:
    edges = (0, *stops)
    return tuple(
        (WorkerId(f"w{i}"), LayerRange(start, stop))
        for i, (start, stop) in enumerate(zip(edges, stops, strict=False))
    )


def sizes(found: LayerMap) -> dict[str, int]:
    return {str(worker): len(layers) for worker, layers in found}


# ------------------------------------------------------------------ one plan


def test_one_sequence_waits_for_every_stage_and_link() -> None:
    machines = cluster(machine(0.01), machine(0.02), rtt_s=0.1)
    found = forecast(MODEL, machines, layer_map(4, 14), ALONE)
    assert found.depth == 1
    assert found.tokens_per_s == pytest.approx(1 / (4 * 0.01 + 10 * 0.02 + 0.05), rel=0.02)


def test_many_sequences_wait_for_the_slowest_stage() -> None:
    machines = cluster(machine(1e-6, 0.001), machine(1e-6, 0.002))
    found = forecast(MODEL, machines, layer_map(4, 14), CROWD)
    assert found.depth >= 2
    assert found.tokens_per_s == pytest.approx(1 / (10 * 0.002), rel=0.05)


def test_stages_that_share_cores_compute_one_after_the_other() -> None:
    machines = cluster(machine(1e-6, 0.001), machine(1e-6, 0.002), machine(1e-6, 0.001))
    shares = dict.fromkeys(machines.memory_bytes, "these")
    apart = forecast(MODEL, machines, layer_map(5, 10, 14), CROWD)
    shared = replace(machines, shares=shares)
    together = forecast(MODEL, shared, layer_map(5, 10, 14), CROWD)
    assert together.tokens_per_s == pytest.approx(1 / (9 * 0.001 + 5 * 0.002), rel=0.02)
    assert apart.tokens_per_s > 1.4 * together.tokens_per_s
    two = replace(machines, shares=shares | {WorkerId("w1"): ""})
    found = forecast(MODEL, two, layer_map(5, 10, 14), CROWD)
    assert together.tokens_per_s < found.tokens_per_s < 1.01 * apart.tokens_per_s


def test_tokens_that_cost_nothing_are_computed_in_one_step() -> None:
    """Reading the layers takes all the time: more steps would read them more often."""
    machines = cluster(machine(0.01), machine(0.02))
    found = forecast(MODEL, machines, layer_map(4, 14), CROWD)
    assert found.depth == 1
    assert found.tokens_per_s == pytest.approx(60 / 0.24, rel=0.02)


def test_prompts_between_the_steps_cost_time() -> None:
    machines = cluster(machine(0.001, 0.001))
    busy = Demand(sequences=1, positions=100, prompt_tokens=4, chunk_tokens=64)
    alone, beside = (
        forecast(MODEL, machines, layer_map(14), demand).tokens_per_s for demand in (ALONE, busy)
    )
    assert beside < alone / 2


def test_stages_wait_where_some_steps_have_prompts() -> None:
    """Both stages are alike, so one waits whenever only the other one has a part of a prompt."""
    machines = cluster(machine(1e-6, 0.001), machine(1e-6, 0.001))
    some = Demand(sequences=60, positions=1, prompt_tokens=0.5, chunk_tokens=60)
    all_alike = Demand(sequences=60, positions=1, prompt_tokens=0.5, chunk_tokens=15)
    rates = [forecast(MODEL, machines, layer_map(7, 14), d).tokens_per_s for d in (some, all_alike)]
    assert rates[1] == pytest.approx(1 / (7 * 0.0015), rel=0.05)
    assert 0.6 < rates[0] / rates[1] < 0.9


def test_the_depth_is_the_best_one_when_stages_wait_for_each_other() -> None:
    """By the bounds, three steps in flight would be best."""
    machines = cluster(*[machine(0.01, 0.0005)] * 3, rtt_s=0.01)
    demand = Demand(sequences=4, positions=100, prompt_tokens=0.5, chunk_tokens=128)
    found = forecast(MODEL, machines, layer_map(5, 10, 14), demand)
    assert found.depth == 2
    assert found.tokens_per_s == pytest.approx(21.8, rel=0.01)


def test_prompts_are_a_part_of_the_steps_and_as_many_as_there_are() -> None:
    demand = Demand(sequences=60, positions=100, prompt_tokens=0.5, chunk_tokens=40)
    for sequences, share in ((20.0, 0.25), (80.0, 1.0), (160.0, 1.0)):
        usual, longer = demand.step_kinds(sequences)
        mean = demand.mean_step(sequences)
        assert demand.prompt_share(sequences) == share
        assert (usual.tokens, usual.prompts, usual.prompt_tokens) == (sequences, 0.0, 0.0)
        assert (longer.tokens, longer.prompts) == (sequences, 1.0)
        assert mean.prompt_tokens == 0.5 * sequences == share * longer.prompt_tokens
        assert mean.prompts == share


def test_a_stranger_is_as_far_from_its_prior_as_others_were_at_first() -> None:
    """The other one took 100 times its prior, and is four times slower since; it is not asked."""
    other = WorkerSpeed(Prior(1e-4, 0.0, 0.0, 0.0, 0.0, 0.0))
    for at in range(100):
        slower = 4.0 if at >= 50 else 1.0
        other.observe(
            Work(1, 1),
            layers=4.0,
            is_last=False,
            layers_s=0.04 * slower,
            other_s=0.0,
            now=float(at),
        )
    stranger = WorkerSpeed(Prior(2e-4, 0.0, 0.0, 0.0, 0.0, 0.0))
    machines = cluster(stranger, other)
    found = forecast(MODEL, machines, layer_map(14), ALONE)
    assert found.tokens_per_s == pytest.approx(1 / (14 * 0.02), rel=0.05)
    assert forecast(MODEL, machines.subset([WorkerId("w0")]), layer_map(14), ALONE) == found


# ------------------------------------------------------------------ the best plan


def best(machines: Machines, demand: Demand, objective: Objective = "auto") -> LayerMap:
    found = best_forecast(MODEL, machines, demand, objective=objective, kv_tokens=0)
    assert found is not None
    return found.partition.layer_map


def test_layers_go_by_speed_for_throughput() -> None:
    machines = cluster(machine(0.04), machine(0.02), machine(0.01))
    found = best(machines, CROWD, "throughput")
    assert sizes(found) == {"w0": 2, "w1": 4, "w2": 8}


def test_the_fastest_serves_alone_for_latency() -> None:
    machines = cluster(machine(0.04), machine(0.02), machine(0.01))
    assert sizes(best(machines, ALONE, "latency")) == {"w2": 14}


def test_the_goal_follows_the_load() -> None:
    machines = cluster(*(machine(0.001, 0.001) for _ in range(3)), rtt_s=0.01)
    assert len(best(machines, ALONE)) == 1
    assert sorted(sizes(best(machines, CROWD)).values()) == [4, 5, 5]


def test_a_machine_that_hurts_is_left_out() -> None:
    machines = cluster(machine(0.001, 0.001), machine(0.001, 0.001), machine(0.1, 0.1))
    assert sizes(best(machines, CROWD)) == {"w0": 7, "w1": 7}


def test_between_throughput_and_latency() -> None:
    """Two machines help two sequences; a third one, far away, would only if there were many."""
    machines = cluster(*(machine(1e-6, 0.001) for _ in range(3)))
    network = LinkSpeeds(bytes_per_token=0)
    for pair in permutations(machines.speeds, 2):
        network.observe(*pair, rtt_s=0.2 if "w2" in pair else 0.0, bytes_per_s=1e9)
    machines = Machines(machines.memory_bytes, machines.speeds, network.links)
    two = Demand(sequences=2, positions=100, prompt_tokens=0, chunk_tokens=1)
    assert len(best(machines, two, "throughput")) == 3
    assert sizes(best(machines, two)) == {"w0": 7, "w1": 7}


def test_nothing_fits() -> None:
    machines = cluster(machine(0.01), machine(0.01), memory_bytes=500)
    assert best_forecast(MODEL, machines, CROWD, objective="auto", kv_tokens=0) is None


def test_nobody_is_there() -> None:
    assert best_forecast(MODEL, cluster(), CROWD, objective="auto", kv_tokens=0) is None


def test_what_is_expected_before_anything_was_asked() -> None:
    assert Demand.expected(3) == Demand(
        sequences=3, positions=256, prompt_tokens=1, chunk_tokens=128
    )
    assert Demand.expected(0).sequences == 1


def test_scores_can_be_compared_between_plans() -> None:
    machines = cluster(machine(0.01), machine(0.02), machine(0.03))
    short, long = layer_map(4, 14), layer_map(4, 9, 14)

    def scores(objective: Objective) -> list[float]:
        return [score(MODEL, machines, one, CROWD, objective=objective) for one in (short, long)]

    # Steps of 60 / 3 sequences, and the slowest stages of 0.2 and 0.15 s.
    assert scores("throughput") == pytest.approx([20 / 0.2, 20 / 0.15], rel=0.02)
    assert scores("latency") == pytest.approx([1 / 0.24, 1 / 0.29], rel=0.02)
    assert scores("auto")[0] == forecast(MODEL, machines, short, CROWD).tokens_per_s


def test_latency_is_planned_for_one_sequence() -> None:
    """One token is quicker on w0, sixty at once on w1."""
    machines = cluster(machine(0.001, 0.01), machine(0.1, 0.0))
    assert sizes(best(machines, CROWD, "latency")) == {"w0": 14}
    assert sizes(best(machines, CROWD)) == {"w1": 14}


def test_the_score_is_the_rate_that_the_goal_maximises() -> None:
    machines = replace(cluster(machine(0.01), machine(0.02)), overhead_s=0.1)
    found = forecast(MODEL, machines, layer_map(4, 14), CROWD)
    assert found.score("throughput") == pytest.approx(30 / 0.2, rel=0.02)  # two stages, 60 / 2
    assert found.score("latency") == pytest.approx(1 / 0.34, rel=0.02)
    assert found.score("auto") == found.tokens_per_s


def test_more_steps_fill_the_time_beside_the_stages() -> None:
    """A stage of 0.1 s waits 0.3 s for the coordinator, unless other steps come meanwhile."""
    machines = replace(cluster(machine(1e-6, 0.1 / 14)), overhead_s=0.3)
    two = Demand(sequences=2, positions=100, prompt_tokens=0, chunk_tokens=1)
    found = forecast(MODEL, machines, layer_map(14), two)
    assert found.depth == 2
    assert found.tokens_per_s == pytest.approx(2 / 0.4, rel=0.02)
