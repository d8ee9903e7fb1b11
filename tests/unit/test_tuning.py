"""What is tried, what counts, and what is called best, with made-up figures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from benchmarks.tuning.agreement import check_answers
from benchmarks.tuning.configurations import Axis, Configuration, Space, make_space
from benchmarks.tuning.figures import (
    Heard,
    LoadFigures,
    Outcome,
    Run,
    WorkerFacts,
    load_figures,
    quantile,
)
from benchmarks.tuning.recommendation import best, noise, recommend
from benchmarks.tuning.search import Search, Step
from benchmarks.tuning.subsets import layer_seconds, subset_configurations
from distributed_llm.common.errors import CapacityError, DistributedLLMError
from distributed_llm.common.messages import Capabilities
from distributed_llm.common.units import parse_layers
from distributed_llm.coordinator.model_cost import ModelCost

ANSWERS = ((7, 8, 9), (1, 2, 3))
COST = ModelCost((1000,) * 8, 100, 100, 0, (1,) * 8)


def figures(tokens_per_s: float, answer_s: float = 1.0) -> LoadFigures:
    return LoadFigures(tokens_per_s, answer_s, 0.1, 0.02, 0.03)


def run_of(
    tokens_per_s: float, answer_s: float = 1.0, answers: tuple[tuple[int, ...], ...] = ANSWERS
) -> Run:
    loads = {1: figures(1 / answer_s, answer_s), 8: figures(tokens_per_s)}
    return Run(loads, (("pc", "0-8"),), (worker("pc"),), answers)


def worker(
    name: str,
    *,
    layer_s: float | None = 0.001,
    memory: int = 1 << 20,
    bandwidth: float = 1e9,
    device: str = "cpu",
) -> WorkerFacts:
    able = Capabilities(
        device=device,
        device_name="",
        platform="",
        memory_bytes=memory,
        cores=1,
        threads=1,
        memory_bandwidth_bytes_per_s=bandwidth,
        flops_per_s=1e9,
    )
    return WorkerFacts(name, able, layer_s)


def outcome(configuration: Configuration, *rates: float, answer_s: float = 1.0) -> Outcome:
    return Outcome(configuration, tuple(run_of(rate, answer_s) for rate in rates))


# ------------------------------------------------------------------ configurations


def test_a_configuration_says_what_differs_from_the_defaults() -> None:
    assert Configuration().changes == {}
    assert Configuration().title == "defaults"
    tried = Configuration(strategy="custom", layers=(("pc", "1-6"), ("mac", "7-8")))
    assert tried.changes == {"strategy": "custom", "layers": {"pc": "1-6", "mac": "7-8"}}
    assert tried.title == "layers pc 1-6 mac 7-8"
    assert tried.environment == {
        "DLLM_COORDINATOR__STRATEGY": "custom",
        "DLLM_COORDINATOR__LAYERS": "pc=1-6,mac=7-8",
    }


def test_values_that_change_nothing_are_left_out_unless_asked_for() -> None:
    def space(model_dtype: str, given: Mapping[str, Sequence[object] | None]) -> dict[str, object]:
        found = make_space(
            quick=False, given=given, num_workers=1, most_requests=4, model_dtype=model_dtype
        )
        return {axis.name: axis.values for axis in found.axes}

    usual = space("bfloat16", {})
    assert usual["dtype"] == ("auto", "float32")
    assert usual["max_batch_sequences"] == (256,)
    assert "replicas" not in usual
    assert "wire_dtype" not in usual
    assert "wire_dtype" in space("float32", {})
    asked = space("bfloat16", {"dtype": ["bfloat16", "auto"], "max_batch_sequences": [64]})
    assert asked["dtype"] == ("bfloat16", "auto")
    assert asked["max_batch_sequences"] == (64,)


def test_the_first_values_are_the_baseline() -> None:
    space = Space((Axis("strategy", ("even", "memory")), Axis("max_batch_tokens", (128, 512))))
    assert space.baseline == Configuration(strategy="even", max_batch_tokens=128)


# ------------------------------------------------------------------ figures


def test_a_load_is_measured_while_all_are_there() -> None:
    askers = [
        [Heard(0.0, [1.0, 2.0]), Heard(2.0, [3.0, 4.0])],
        [Heard(0.0, [2.0, 4.0]), Heard(4.0, [7.0, 20.0])],  # alone after 4.0
    ]
    found = load_figures(askers, outside_share=None, wire_bytes_per_token=None, busy={})
    assert found.tokens_per_s == 6 / 4.0
    assert found.first_token_s == 1.5
    assert found.gap_p50_s == 1.5
    assert found.gap_p99_s == 13.0
    assert found.answer_s == 3.0


def test_quantiles_are_values_that_were_seen() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1, 1, 3, 5, 5]


def test_an_outcome_is_the_median_of_its_runs() -> None:
    found = outcome(Configuration(), 10.0, 30.0, 20.0)
    assert found.loads[8].tokens_per_s == 20.0
    assert found.spread(8) == 1.0


# ------------------------------------------------------------------ agreement


def test_other_answers_than_most_are_a_failure() -> None:
    wrong = Outcome(Configuration(strategy="even"), (run_of(9, answers=((7, 8, 5), (1, 2, 3))),))
    right = [outcome(Configuration(), 5.0), outcome(Configuration(max_batch_tokens=128), 6.0)]
    found = check_answers([wrong, *right], "float32")
    assert "from token 3 of prompt 1 on (5, not 9)" in found[0].failure
    assert [one.failure for one in found[1:]] == ["", ""]


def test_answers_are_compared_within_a_dtype() -> None:
    other = Outcome(Configuration(dtype="bfloat16"), (run_of(9, answers=((1,), (2,))),))
    same = Outcome(Configuration(dtype="float32"), (run_of(9, answers=((1,), (2,))),))
    found = check_answers([outcome(Configuration(), 5.0, 5.0), other, same], "float32")
    assert [bool(one.failure) for one in found] == [False, False, True]


def test_machines_of_several_kinds_may_round_differently() -> None:
    mixed = replace(
        run_of(9, answers=((7, 8, 5), (1, 2, 3))),
        workers=(worker("pc", device="cuda:0"), worker("mac", device="mps")),
    )
    outcomes = [outcome(Configuration(), 5.0, 5.0), Outcome(Configuration("even"), (mixed,))]
    assert check_answers(outcomes, "bfloat16")[1].failure == ""
    assert "round differently" in check_answers(outcomes, "bfloat16")[1].note
    assert check_answers(outcomes, "float32")[1].failure


# ------------------------------------------------------------------ recommendation


def test_noise_is_what_runs_of_one_configuration_differ_by() -> None:
    calm, rough = outcome(Configuration(), 100, 100), outcome(Configuration("even"), 80, 120)
    assert noise([calm], "throughput") == 0.03
    assert noise([rough], "throughput") == pytest.approx(0.2)


def test_what_is_better_only_by_the_noise_needs_no_settings() -> None:
    plain, tuned = outcome(Configuration(), 98, 102), outcome(Configuration("even"), 100, 104)
    assert best([tuned, plain], "throughput") is plain
    faster = outcome(Configuration("even"), 118, 122)
    assert best([faster, plain], "throughput") is faster


def test_latency_and_throughput_have_their_own_best() -> None:
    plain = outcome(Configuration(), 100)
    quick = outcome(Configuration(objective="latency"), 80, answer_s=0.5)
    full = outcome(Configuration(objective="throughput"), 150, answer_s=2.0)
    picks = {
        goal: recommend([plain, quick, full], goal, model_dtype="float32")
        for goal in ("latency", "throughput", "both")
    }
    assert picks["latency"].outcome is quick
    assert picks["throughput"].outcome is full
    assert picks["both"].outcome is quick
    assert "2.00 times as fast as defaults (1.00 s for an answer)" in picks["latency"].why
    assert picks["throughput"].why.startswith("150 tokens/s with 8 requests at once: 1.50 times")


def test_other_answers_are_not_recommended_unless_allowed() -> None:
    plain, narrow = outcome(Configuration(), 100), outcome(Configuration(dtype="bfloat16"), 200)
    pick = recommend([plain, narrow], "throughput", model_dtype="float32")
    assert pick.outcome is plain
    assert "dtype bfloat16 would be 2.00 times as fast" in pick.why
    allowed = recommend([plain, narrow], "throughput", model_dtype="float32", any_dtype=True)
    assert allowed.outcome is narrow


def test_what_failed_is_not_recommended() -> None:
    failed = replace(outcome(Configuration("even"), 500), failure="gives other answers")
    pick = recommend([failed, outcome(Configuration(), 100)], "both", model_dtype="float32")
    assert pick.outcome.configuration == Configuration()


# ------------------------------------------------------------------ subsets


def test_the_fastest_get_layers_in_proportion_to_their_speed() -> None:
    workers = [worker("slow", layer_s=0.003), worker("fast", layer_s=0.001)]
    one, two = subset_configurations(Configuration(), (1, 2), workers, COST, 16)
    assert one.layers == (("fast", "1-8"),)
    lengths = {name: len(parse_layers(held)) for name, held in two.layers}
    assert lengths == {"fast": 6, "slow": 2}


def test_a_subset_that_cannot_hold_the_model_is_left_out() -> None:
    workers = [worker("a", memory=5000), worker("b", memory=5000)]
    found = subset_configurations(Configuration(), (1, 2), workers, COST, 16)
    assert [len(one.layers) for one in found] == [2]


def test_who_computed_nothing_is_judged_by_its_bandwidth() -> None:
    workers = [worker("a", layer_s=0.002), worker("b", layer_s=None, bandwidth=4e9)]
    assert layer_seconds(workers) == {"a": 0.002, "b": 0.0005}


# ------------------------------------------------------------------ the search


class Bench:
    """Runs configurations in no time of its own; `rates` says how fast they are."""

    def __init__(self, rates: Mapping[str, float], run_s: float = 1.0) -> None:
        self.rates, self.run_s = rates, run_s
        self.now = 0.0
        self.order: list[str] = []
        self.steps: list[Step] = []

    def trial(self, configuration: Configuration) -> Run:
        self.now += self.run_s
        self.order.append(configuration.title)
        rate = self.rates.get(configuration.title, 100.0)
        if rate == 0:
            raise CapacityError("It does not fit.\nNot at all.")
        return run_of(rate)

    def search(
        self, *axes: Axis, rounds: int = 2, limit_s: float | None = None, again: bool = True
    ) -> Search:
        return Search(
            Space(axes),
            self.trial,
            subsets=lambda start, run: [],
            model_dtype="float32",
            goal="throughput",
            rounds=rounds,
            again=again,
            limit_s=limit_s,
            clock=lambda: self.now,
            on_step=self.steps.append,
        )


STRATEGIES = Axis("strategy", ("memory", "even"))
CHUNKS = Axis("max_batch_tokens", (512, 128))
MEMORY, EVEN = "strategy memory", "strategy even"


def test_values_of_a_setting_run_in_turns() -> None:
    bench = Bench({})
    bench.search(STRATEGIES).run()
    assert bench.order == [MEMORY, EVEN, MEMORY, EVEN]


def test_the_next_setting_starts_from_the_best_so_far() -> None:
    bench = Bench({EVEN: 150.0, f"{EVEN}, max_batch_tokens 128": 200.0})
    outcomes = bench.search(STRATEGIES, CHUNKS, rounds=1).run()
    assert bench.order == [MEMORY, EVEN, EVEN, f"{EVEN}, max_batch_tokens 128"]
    assert [len(one.runs) for one in outcomes] == [1, 2, 1]


def test_nothing_runs_again_where_nothing_is_random() -> None:
    bench = Bench({})
    bench.search(STRATEGIES, CHUNKS, rounds=1, again=False).run()
    assert bench.order == [MEMORY, EVEN, f"{MEMORY}, max_batch_tokens 128"]
    assert bench.steps[-1].planned == bench.steps[-1].number == 3


def test_a_failure_is_told_and_not_tried_again() -> None:
    bench = Bench({EVEN: 0.0})
    outcomes = bench.search(STRATEGIES).run()
    assert bench.order == [MEMORY, EVEN, MEMORY]
    assert [one.failure for one in outcomes] == ["", "It does not fit."]
    assert bench.steps[-1].planned == bench.steps[-1].number == 3


def test_nothing_that_runs_at_all_is_an_error() -> None:
    bench = Bench({MEMORY: 0.0, EVEN: 0.0})
    with pytest.raises(DistributedLLMError, match="does not fit"):
        bench.search(STRATEGIES).run()


def test_the_first_failing_leaves_the_others() -> None:
    bench = Bench({MEMORY: 0.0})
    bench.search(STRATEGIES, CHUNKS, rounds=1).run()
    assert bench.order[-1] == f"{EVEN}, max_batch_tokens 128"


def test_what_would_take_too_long_is_left_out_and_told() -> None:
    bench = Bench({}, run_s=10.0)
    search = bench.search(STRATEGIES, CHUNKS, limit_s=30.0)
    search.run()
    assert bench.order == [MEMORY, EVEN, MEMORY, EVEN]
    assert search.left_out == ["max_batch_tokens at all, for want of time"]
    assert bench.steps[-1].left_s == 40.0  # it was not known yet


def test_a_round_that_would_take_too_long_is_left_out_and_told() -> None:
    bench = Bench({}, run_s=10.0)
    search = bench.search(STRATEGIES, rounds=3, limit_s=35.0)
    search.run()
    assert bench.order == [MEMORY, EVEN, MEMORY, EVEN]
    assert search.left_out == ["strategy from round 3 of 3 on, for want of time"]


def test_the_rest_of_the_time_is_told() -> None:
    bench = Bench({}, run_s=10.0)
    bench.search(STRATEGIES).run()
    ended = [step for step in bench.steps if step.outcome]
    assert [step.left_s for step in ended] == [30.0, 20.0, 10.0, 0.0]
    assert bench.steps[0].left_s is None


def test_other_dtypes_run_last_and_are_not_taken_over() -> None:
    bench = Bench({"dtype bfloat16": 900.0})
    outcomes = bench.search(Axis("dtype", ("auto", "bfloat16")), CHUNKS, rounds=1).run()
    assert bench.order == ["defaults", "max_batch_tokens 128", "defaults", "dtype bfloat16"]
    assert len(outcomes) == 3


def test_objectives_are_for_strategy_speed() -> None:
    bench = Bench({EVEN: 200.0})
    axes = Axis("strategy", ("speed", "even")), Axis("objective", ("auto", "latency"))
    bench.search(*axes, rounds=1).run()
    assert bench.order == ["defaults", EVEN]
