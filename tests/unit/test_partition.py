"""Partitions: no other order, subset or cut is better where the answer is meant to be exact."""

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.types import LayerRange, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition import search as partition
from distributed_llm.coordinator.partition.exact import solve_exactly, solve_uniform
from distributed_llm.coordinator.partition.search import best_partition, predict
from distributed_llm.coordinator.partition.tables import (
    Candidate,
    Hop,
    Links,
    Partition,
    PartitionObjective,
    Tables,
    WorkerTimes,
    make_tables,
)
from distributed_llm.coordinator.plan import LayerMap

OBJECTIVES: tuple[PartitionObjective, ...] = ("throughput", "latency")
SAME = Links(Hop(0.0, 0.0), {})


@dataclass(frozen=True)
class Problem:
    cost: ModelCost
    candidates: tuple[Candidate, ...]
    links: Links
    kv_tokens: int

    def best(self, objective: PartitionObjective) -> Partition | None:
        return best_partition(
            self.cost, self.candidates, self.links, objective=objective, kv_tokens=self.kv_tokens
        )

    def times(self, layer_map: LayerMap) -> Partition:
        return predict(self.cost, self.candidates, self.links, layer_map)

    def tables(self) -> Tables:
        ranked = sorted(self.candidates, key=lambda candidate: candidate.worker)
        return make_tables(self.cost, ranked, self.links, self.kv_tokens)


def key(objective: PartitionObjective, found: Partition) -> tuple[float, float]:
    if objective == "throughput":
        return found.slowest_s, found.total_s
    return found.total_s, len(found.layer_map)


def is_same(objective: PartitionObjective, one: Partition, other: Partition) -> bool:
    """Return whether the objective sees no difference between them, but for rounding."""
    pairs = zip(key(objective, one), key(objective, other), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-7) for a, b in pairs)


def is_whole(found: LayerMap, problem: Problem) -> bool:
    """Return whether each layer is served once, in order, by workers who have the memory."""
    memory = {each.worker: each.memory_bytes for each in problem.candidates}
    served = [i for _, held in found for i in range(held.start, held.stop)]
    needed = {w: problem.cost.stage_bytes(held, problem.kv_tokens) for w, held in found}
    return (
        served == list(range(problem.cost.num_layers))
        and len(needed) == len(found)
        and problem.cost.may_be_cut(held.start for _, held in found)
        and all(size <= memory[worker] for worker, size in needed.items())
    )


# ------------------------------------------------------------------ every partition, written again


def every_partition(problem: Problem) -> Iterator[Partition]:
    """Yield all partitions that fit: each ordered subset of the workers with each cut."""
    cost, default = problem.cost, problem.links.default
    size, mean = cost.num_layers, sum(cost.layer_bytes) / cost.num_layers
    for count in range(1, min(size, len(problem.candidates)) + 1):
        cuts = list(itertools.combinations(range(1, size), count - 1))
        for team in itertools.permutations(problem.candidates, count):
            pairs = itertools.pairwise([each.worker for each in team])
            hops = [problem.links.known.get(pair, default) for pair in pairs]
            for cut in cuts:
                edges = list(itertools.pairwise((0, *cut, size)))
                layer_map = tuple(
                    (each.worker, LayerRange(*edge)) for each, edge in zip(team, edges, strict=True)
                )
                if is_whole(layer_map, problem):
                    times = [hop.busy_s for hop in hops]
                    for each, (start, stop) in zip(team, edges, strict=True):
                        layers = sum(cost.layer_bytes[start:stop]) / mean
                        taken = each.times.task_s + each.times.layer_s * layers
                        times.append(taken + each.times.last_s * (stop == size))
                    total = sum(times) + sum(hop.latency_s for hop in hops)
                    yield Partition(layer_map, max(times), total)


def brute_force(problem: Problem, objective: PartitionObjective) -> Partition | None:
    """Return the best of all partitions; sums that differ by rounding alone are ties."""
    return min(
        every_partition(problem),
        key=lambda found: tuple(round(each, 8) for each in key(objective, found)),
        default=None,
    )


# ------------------------------------------------------------------ problems

seconds = st.integers(0, 20).map(lambda milliseconds: milliseconds / 1000)
speeds = st.builds(WorkerTimes, seconds, seconds, seconds)
hops = st.builds(Hop, seconds, seconds)


@st.composite
def problems(
    draw: st.DrawFn, *, alike: bool, workers: int = 4, layers: int = 6, roomy: bool = False
) -> Problem:
    size = draw(st.integers(1, layers))
    sizes = st.integers(1, 40)
    one_size = alike or draw(st.booleans())  # and KV cache may differ
    layer_bytes = [draw(sizes)] * size if one_size else [draw(sizes) for _ in range(size)]
    first, last, shared = (draw(st.integers(0, 60)) for _ in range(3))
    kv_sizes = st.integers(0, 2)
    kv = (draw(kv_sizes),) * size if alike else tuple(draw(kv_sizes) for _ in range(size))
    inside = st.sets(st.integers(1, size - 1), max_size=2) if size > 1 else st.just(set())
    together = set() if alike else draw(inside)
    each = draw(st.integers(0, 9))
    cost = ModelCost(
        *(tuple(layer_bytes), first, last, shared, kv),
        each_bytes=each,
        uncut=tuple(sorted(together)),
    )
    kv_tokens = draw(st.integers(0, 8))
    whole = cost.stage_bytes(LayerRange(0, size), kv_tokens)
    count = draw(st.integers(1, workers))
    names = draw(st.permutations([WorkerId(f"w{i}") for i in range(count)]))
    memory = st.integers(whole // 2 if roomy else 0, whole + 5)
    candidates = [Candidate(name, draw(memory), draw(speeds)) for name in names]
    pairs = [] if alike else list(itertools.permutations(names, 2))
    known = {pair: draw(hops) for pair in pairs if draw(st.booleans())}
    return Problem(cost, tuple(candidates), Links(draw(hops), known), kv_tokens)


def random_problem(seed: int, workers: int, layers: int) -> Problem:
    """Return a problem with unequal layers, most links known, and memory to spare or little."""
    draw = random.Random(seed)
    cost = ModelCost(tuple(draw.randint(60, 140) for _ in range(layers)), 80, 80, 0, (1,) * layers)
    least = 1.3 * sum(cost.layer_bytes) / workers + 100
    candidates = [
        Candidate(
            WorkerId(f"w{i:03}"),
            int(least * draw.uniform(1, draw.choice([1.3, 3]))),
            WorkerTimes(
                draw.uniform(0, 0.01), draw.lognormvariate(-6, 0.7), draw.uniform(0, 0.005)
            ),
        )
        for i in range(workers)
    ]
    pairs = itertools.permutations([each.worker for each in candidates], 2)
    known = {
        pair: Hop(draw.uniform(0, 0.02), draw.lognormvariate(-5, 1.5))
        for pair in pairs
        if draw.random() < 0.7
    }
    return Problem(cost, tuple(candidates), Links(Hop(0.01, 0.005), known), kv_tokens=1)


def plain(
    *layer_s: float, memory: Sequence[int] = (1000, 1000), size: int = 6, links: Links = SAME
) -> Problem:
    """Return workers a, b, ... with these seconds per layer, nothing else, and layers of 10."""
    candidates = tuple(
        Candidate(WorkerId(name), room, WorkerTimes(0.0, taken, 0.0))
        for name, taken, room in zip("abcdef", layer_s, memory, strict=False)
    )
    return Problem(ModelCost((10,) * size, 0, 0, 0, (0,) * size), candidates, links, 0)


def cuts(found: Partition | None) -> list[tuple[str, int, int]]:
    assert found is not None
    return [(worker, held.start, held.stop) for worker, held in found.layer_map]


# ------------------------------------------------------------------ the best


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_few_workers_get_the_best_of_all_partitions(
    objective: PartitionObjective, data: st.DataObject
) -> None:
    problem = data.draw(problems(alike=False))
    found, best = problem.best(objective), brute_force(problem, objective)
    assert (found is None) == (best is None)
    if found and best:
        assert is_whole(found.layer_map, problem)
        assert is_same(objective, found, best)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_alike_layers_and_links_get_the_best_of_all_partitions(
    objective: PartitionObjective, data: st.DataObject
) -> None:
    problem = data.draw(problems(alike=True))
    found, best = (
        solve_uniform(problem.tables(), objective),
        brute_force(problem, objective),
    )
    assert bool(found) == (best is not None)
    if found and best:
        assert is_whole(found, problem)
        assert is_same(objective, problem.times(found), best)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_both_exact_ways_agree(objective: PartitionObjective, data: st.DataObject) -> None:
    problem = data.draw(problems(alike=True, workers=7, layers=14, roomy=True))
    tables = problem.tables()
    found = solve_uniform(tables, objective)
    other = solve_exactly(tables, objective)
    assert bool(found) == bool(other)
    if found:
        assert is_same(objective, problem.times(found), problem.times(other))


def test_throughput_shares_by_speed_and_latency_takes_the_fastest() -> None:
    problem = plain(0.001, 0.002)
    assert {w: b - a for w, a, b in cuts(problem.best("throughput"))} == {"a": 4, "b": 2}
    assert cuts(problem.best("latency")) == [("a", 0, 6)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(memory=st.lists(st.integers(0, 7).map(lambda layers: 10 * layers), min_size=3, max_size=3))
def test_latency_shares_evenly_where_the_sum_leaves_the_choice(memory: list[int]) -> None:
    problem = plain(0.25, 0.25, 0.25, memory=memory)
    found = problem.best("latency")
    if found:
        team = [worker for worker, _ in found.layer_map]
        others = [p for p in every_partition(problem) if [w for w, _ in p.layer_map] == team]
        assert found.slowest_s == min(other.slowest_s for other in others)


@pytest.mark.parametrize("known", [{}, {(WorkerId("d"), WorkerId("c")): Hop(0.5, 0.0)}])
def test_no_more_stages_than_needed(known: dict[tuple[WorkerId, WorkerId], Hop]) -> None:
    links = Links(Hop(0.0, 0.0), known)
    problem = plain(0.0, 0.0, 0.0, 0.0, memory=(20, 20, 20, 40), links=links)
    for objective in OBJECTIVES:
        assert len(cuts(problem.best(objective))) == 2


@pytest.mark.parametrize(
    "links",
    [
        Links(Hop(0.1, 0.1), {(WorkerId("b"), WorkerId("a")): Hop(0.0, 0.0)}),
        Links(Hop(0.0, 0.0), {(WorkerId("a"), WorkerId("b")): Hop(math.inf, 0.0)}),
    ],
)
def test_a_link_decides_the_order(links: Links) -> None:
    problem = plain(0.001, 0.001, memory=(30, 30), links=links)
    for objective in OBJECTIVES:
        assert cuts(problem.best(objective)) == [("b", 0, 3), ("a", 3, 6)]


def test_nobody_and_too_little_memory_are_none() -> None:
    assert plain().best("latency") is None
    for objective in OBJECTIVES:
        assert plain(0.001, 0.001, memory=(30, 29)).best(objective) is None


def test_predict_adds_up_stages_and_hops() -> None:
    problem = plain(0.001, 0.002, links=Links(Hop(0.5, 0.25), {}))
    a, b = (each.worker for each in problem.candidates)
    found = problem.times(((b, LayerRange(0, 2)), (a, LayerRange(2, 6))))
    assert found.slowest_s == 0.25
    assert found.total_s == pytest.approx(0.004 + 0.004 + 0.75)


def test_layers_without_bytes_are_all_of_mean_size() -> None:
    cost, (worker,) = ModelCost((0,) * 4, 0, 0, 0, (0,) * 4), plain(0.5).candidates
    found = predict(cost, [worker], SAME, ((worker.worker, LayerRange(0, 4)),))
    assert found.total_s == 2.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layers_of_one_size_may_differ_in_their_kv_cache(objective: PartitionObjective) -> None:
    """All links are alike, too: no way that is for uniform problems must be taken."""
    workers = plain(1.0, 1.0, 1.0, memory=(60, 10, 10)).candidates
    cost = ModelCost((10,) * 4, 0, 0, 0, layer_kv_bytes=(5, 5, 0, 0))
    found = Problem(cost, workers, SAME, kv_tokens=4).best(objective)
    assert cuts(found)[0] == ("a", 0, 2)
    assert [(start, stop) for _, start, stop in cuts(found)[1:]] == [(2, 3), (3, 4)]


# ------------------------------------------------------------------ the search


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_search_comes_close_to_the_best_and_never_above_its_starts(
    objective: PartitionObjective,
) -> None:
    gaps = []
    for seed in range(40):
        problem = random_problem(seed, workers=6, layers=16)
        tables = problem.tables()
        found = partition.search(tables, objective)
        assert is_whole(found, problem)
        reached = key(objective, problem.times(found))[0]
        for start in partition.relaxed_starts(tables, objective):
            assert reached <= key(objective, problem.times(start))[0] + 1e-7
        exact = solve_exactly(tables, objective)
        gaps.append(reached / key(objective, problem.times(exact))[0] - 1)
    assert statistics.median(gaps) < 1e-6
    assert statistics.mean(gaps) < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_search_goes_on_from_its_best_start(
    objective: PartitionObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "_MAX_ADDITIONS", 0)
    for seed in range(10):
        problem = random_problem(seed, workers=6, layers=16)
        tables = problem.tables()
        reached = key(objective, problem.times(partition.search(tables, objective)))[0]
        for start in partition.relaxed_starts(tables, objective):
            assert reached <= key(objective, problem.times(start))[0] + 1e-7


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_the_search_finds_is_whole(objective: PartitionObjective, data: st.DataObject) -> None:
    problem = data.draw(problems(alike=False, workers=9, layers=12, roomy=True))
    if len(problem.candidates) > 1:
        found = partition.search(problem.tables(), objective)
        assert not found or is_whole(found, problem)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("workers", [5, 60])
def test_the_order_of_the_candidates_does_not_matter(
    objective: PartitionObjective, workers: int
) -> None:
    problem = random_problem(1, workers, layers=24)
    twins = tuple(
        Candidate(WorkerId(f"twin-{each.worker}"), each.memory_bytes, each.times)
        for each in problem.candidates
    )
    problem = Problem(problem.cost, problem.candidates + twins, problem.links, problem.kv_tokens)
    found = problem.best(objective)
    assert found is not None
    assert is_whole(found.layer_map, problem)
    shuffled = list(problem.candidates)
    random.Random(0).shuffle(shuffled)
    assert found == Problem(problem.cost, tuple(shuffled), problem.links, 1).best(objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_search_finds_the_one_that_a_large_layer_fits(objective: PartitionObjective) -> None:
    quick = [Candidate(WorkerId(f"quick{i}"), 20, WorkerTimes(0.0, 0.0, 0.0)) for i in range(60)]
    large = Candidate(WorkerId("large"), 40, WorkerTimes(1.0, 1.0, 0.0))
    problem = Problem(ModelCost((10, 10, 40), 0, 0, 0, (0,) * 3), (*quick, large), SAME, 0)
    found = problem.best(objective)
    assert found is not None
    assert is_whole(found.layer_map, problem)


@pytest.mark.parametrize(("objective", "bound"), [("throughput", 0.85), ("latency", 0.72)])
def test_the_search_beats_looking_away_from_links(
    objective: PartitionObjective, bound: float
) -> None:
    ratios = []
    for seed in range(6):
        problem = random_problem(seed, workers=40, layers=48)
        tables = problem.tables()
        start = min(
            key(objective, problem.times(s))[0] for s in partition.relaxed_starts(tables, objective)
        )
        found = partition.search(tables, objective)
        assert is_whole(found, problem)
        ratios.append(key(objective, problem.times(found))[0] / start)
    assert statistics.mean(ratios) < bound


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_many_workers_serve_a_large_model(objective: PartitionObjective) -> None:
    problem = random_problem(2, workers=150, layers=126)
    found = problem.best(objective)
    assert found is not None
    assert is_whole(found.layer_map, problem)
    start = min(
        key(objective, problem.times(each))
        for each in partition.relaxed_starts(problem.tables(), objective)
    )
    assert key(objective, found) < start
