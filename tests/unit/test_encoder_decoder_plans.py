"""Plans of encoder-decoders: where the layers of both stacks are best, and how fast that is."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common.messages import Capabilities, StageReady
from distributed_llm.common.settings import CoordinatorSettings, Objective
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition import search as partition
from distributed_llm.coordinator.partition.exact import (
    Window,
    held_karp,
    path_times,
    solve_exactly,
)
from distributed_llm.coordinator.partition.search import best_partition, predict
from distributed_llm.coordinator.partition.tables import (
    Candidate,
    Hop,
    Links,
    PartitionObjective,
    WorkerTimes,
    make_tables,
)
from distributed_llm.coordinator.plan import (
    LayerMap,
    PipelineStage,
    kv_tokens_of,
    longest_tokens_of,
    plan_of,
)
from distributed_llm.coordinator.planning.dry_run import dry_run
from distributed_llm.coordinator.planning.forecast import best_forecast, forecast
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.speeds.demand import Demand
from distributed_llm.coordinator.speeds.links import LinkSpeeds
from distributed_llm.coordinator.speeds.machines import Machines
from distributed_llm.coordinator.speeds.work import Work
from distributed_llm.coordinator.speeds.worker_speed import Prior, WorkerSpeed
from distributed_llm.summary import stage_row
from tests.unit.fake_model import MODEL

OBJECTIVES: tuple[PartitionObjective, ...] = ("throughput", "latency")
SCORES: tuple[Objective, ...] = ("throughput", "latency", "auto")
ACROSS = 0.125
"""Share of a decoder layer that reads a source: two of the sixteen parts of BART's and T5's."""

Times = tuple[float, float]
"""Seconds of the slowest stage or link, and of all."""


# ------------------------------------------------------------------ every partition, written again


def times_of(
    cost: ModelCost, candidates: dict[WorkerId, Candidate], links: Links, layer_map: LayerMap
) -> Times:
    """Return what a step takes that decodes, with its share of a step that reads sources."""
    size, encoder = cost.num_layers, cost.encoder_layers
    mean = sum(cost.layer_bytes) / size
    taken, delays = [], 0.0
    for worker, held in layer_map:
        times, layers = candidates[worker].times, range(held.start, held.stop)
        stage_s = times.task_s
        for layer in layers:
            length = cost.layer_bytes[layer] / mean
            if layer < encoder:
                stage_s += times.source_s * length
            else:
                stage_s += (times.layer_s + ACROSS * times.source_s) * length
        stage_s += times.answer_s if layers[-1] >= encoder else 0.0
        stage_s += times.last_s if layers[-1] == size - 1 else 0.0
        taken.append(stage_s)
    for (sender, _), (receiver, held) in itertools.pairwise(layer_map):
        hop = links.known.get((sender, receiver), links.default)
        steps, tokens = links.source_steps, links.source_tokens
        if held.start > encoder:
            steps = tokens = 1.0
        taken.append(hop.busy_s * tokens)
        delays += hop.latency_s * steps
    return max(taken), sum(taken) + delays


def every_layer_map(
    cost: ModelCost, candidates: dict[WorkerId, Candidate], kv_tokens: int
) -> Iterator[LayerMap]:
    size = cost.num_layers
    for count in range(1, min(size, len(candidates)) + 1):
        for team in itertools.permutations(candidates, count):
            for cut in itertools.combinations(range(1, size), count - 1):
                edges = itertools.pairwise((0, *cut, size))
                layer_map = tuple(
                    (w, LayerRange(*edge)) for w, edge in zip(team, edges, strict=True)
                )
                if all(
                    cost.stage_bytes(held, kv_tokens) <= candidates[w].memory_bytes
                    for w, held in layer_map
                ):
                    yield layer_map


milliseconds = st.integers(0, 20).map(lambda ms: ms / 1000)
hops = st.builds(Hop, milliseconds, milliseconds)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelCost, dict[WorkerId, Candidate], Links, int]:
    encoder, decoder = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = encoder + decoder
    sizes = st.sampled_from([3, 20, 40])
    layer_bytes = (draw(sizes),) * encoder + (draw(sizes),) * decoder
    first, last, shared = (draw(st.integers(0, 60)) for _ in range(3))
    kv = (0,) * encoder + (draw(st.integers(0, 2)),) * decoder
    cost = ModelCost(
        layer_bytes,
        *(first, last, shared, kv),
        shared_by=(0, encoder, size - 1),
        encoder_layers=encoder,
    )
    kv_tokens = draw(st.integers(0, 8))
    whole = cost.stage_bytes(LayerRange(0, size), kv_tokens)
    names = [WorkerId(f"w{i}") for i in range(draw(st.integers(1, 3)))]
    speeds = st.builds(WorkerTimes, *[milliseconds] * 5)
    candidates = {
        name: Candidate(name, draw(st.integers(0, whole + 5)), draw(speeds)) for name in names
    }
    known = {pair: draw(hops) for pair in itertools.permutations(names, 2) if draw(st.booleans())}
    shares = st.sampled_from([0.0, 0.25, 1.0])
    return cost, candidates, Links(draw(hops), known, draw(shares), draw(shares)), kv_tokens


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_few_workers_get_the_best_of_all_partitions(
    objective: PartitionObjective,
    problem: tuple[ModelCost, dict[WorkerId, Candidate], Links, int],
) -> None:
    cost, candidates, links, kv_tokens = problem
    every = [
        (times_of(cost, candidates, links, layer_map), layer_map)
        for layer_map in every_layer_map(cost, candidates, kv_tokens)
    ]
    best = min(
        (
            ((slowest, total) if objective == "throughput" else (total,))
            for (slowest, total), _ in every
        ),
        default=None,
    )
    found = best_partition(
        cost, list(candidates.values()), links, objective=objective, kv_tokens=kv_tokens
    )
    if found is None or best is None:
        assert (found, best) == (None, None)
        return
    assert found.layer_map in [layer_map for _, layer_map in every]
    slowest, total = times_of(cost, candidates, links, found.layer_map)
    assert (found.slowest_s, found.total_s) == pytest.approx((slowest, total))
    reached = (slowest, total) if objective == "throughput" else (total,)
    assert reached == pytest.approx(best, rel=1e-9, abs=1e-7)


def random_problem(seed: int) -> tuple[ModelCost, list[Candidate], Links]:
    """Return six machines and a model that three of them hold, with more decoder than encoder."""
    draw = random.Random(seed)
    cost = ModelCost(
        *((75,) * 8 + (100,) * 8, 40, 10, 30, (0,) * 8 + (1,) * 8),
        shared_by=(0, 8, 15),
        encoder_layers=8,
    )
    candidates = [
        Candidate(
            WorkerId(f"w{i}"),
            int(cost.all_weight_bytes * draw.uniform(0.3, 0.7)),
            WorkerTimes(
                *(draw.uniform(0, 0.001), draw.lognormvariate(-6, 0.7), draw.uniform(0, 0.005)),
                source_s=draw.lognormvariate(-7, 0.7),
                answer_s=draw.uniform(0, 0.003),
            ),
        )
        for i in range(6)
    ]
    pairs = itertools.permutations([each.worker for each in candidates], 2)
    known = {pair: Hop(draw.uniform(0, 0.02), draw.uniform(0, 0.01)) for pair in pairs}
    return cost, candidates, Links(Hop(0.01, 0.005), known, 0.2, 0.5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_search_comes_close_to_the_best(objective: PartitionObjective) -> None:
    gaps = []
    for seed in range(6):
        cost, candidates, links = random_problem(seed)
        tables = make_tables(cost, candidates, links, kv_tokens=1)
        found = [
            predict(cost, candidates, links, layer_map)
            for layer_map in (
                partition.search(tables, objective),
                solve_exactly(tables, objective),
            )
        ]
        reached, best = (
            each.slowest_s if objective == "throughput" else each.total_s for each in found
        )
        gaps.append(reached / best - 1)
    assert sorted(gaps)[3] < 1e-6
    assert sum(gaps) / len(gaps) < 0.03


def test_layers_of_one_size_are_not_alike_if_some_are_an_encoder_s() -> None:
    """All links are alike, too: no way that is for uniform problems must be taken."""
    cost = ModelCost((10,) * 6, 0, 0, 0, (0,) * 6, encoder_layers=2)
    candidates = [
        Candidate(WorkerId(name), memory, WorkerTimes(0.0, layer_s, 0.0, source_s))
        for name, memory, layer_s, source_s in (
            ("a", 30, 5.0, 2.0),
            ("b", 30, 4.0, 3.0),
            ("c", 20, 5.0, 4.0),
        )
    ]
    links = Links(Hop(0.0, 0.0), {})
    found = best_partition(cost, candidates, links, objective="latency", kv_tokens=0)
    assert found is not None
    assert found.layer_map == (("a", LayerRange(0, 3)), ("b", LayerRange(3, 6)))


def test_a_part_of_the_stages_is_solved_with_the_hops_at_its_ends() -> None:
    """At its start steps that decode are not under way yet; at its end they are."""
    cost, candidates, links = random_problem(0)
    tables = make_tables(cost, candidates, links, kv_tokens=0)
    between, before, after = 0, 1, 2
    start, stop = cost.encoder_layers, cost.encoder_layers + 2
    times = path_times(tables, [between, before, after], math.inf, slice(start, stop + 1))
    value, found = held_karp(times, Window(1, 1, 2))
    assert found == [(0, 0, stop - start)]
    stage_s = float(tables.stages[between, start, stop])
    enter_s = float(tables.source_delays[before, between])
    leave_s = float(tables.delays[between, after])
    assert value == pytest.approx(enter_s + stage_s + leave_s, abs=1e-8)
    assert enter_s < 0.6 * tables.delays[before, between]


def test_a_search_starts_from_workers_as_quick_as_they_are_on_average() -> None:
    cost, candidates, links = random_problem(0)
    tables = make_tables(cost, candidates, links, kv_tokens=0)
    alike = replace(tables.alike(10, 0), memory=tables.memory * 0 + 1e9)
    roomy = replace(tables, memory=alike.memory)
    answer_s = tables.times[4]
    decodes = 1 - cost.encoder_layers / cost.num_layers
    expected = roomy.stages[:, 0, -1] - (1 - decodes) * answer_s
    assert alike.stages[:, 0, -1] == pytest.approx(expected)


def test_a_hop_that_cannot_be_made_is_made_by_no_source_either() -> None:
    cost = ModelCost((10, 10), 0, 0, 0, (0, 1), encoder_layers=1)
    a, b = (Candidate(WorkerId(name), 12, WorkerTimes(0.0, 1.0, 0.0, 1.0)) for name in "ab")
    links = Links(Hop(math.inf, 0.0), {(b.worker, a.worker): Hop(1.0, 0.0)}, 0.0, 0.0)
    found = best_partition(cost, [a, b], links, objective="latency", kv_tokens=1)
    assert found is not None
    assert [worker for worker, _ in found.layer_map] == [b.worker, a.worker]


# ------------------------------------------------------------------ a model like T5-large

PARAMETER = 1024 * 1024
T5_LARGE = ModelCost(
    layer_bytes=(2 * 12 * PARAMETER,) * 24 + (2 * 16 * PARAMETER,) * 24,
    first_bytes=0,
    last_bytes=2 * 1024,
    shared_bytes=2 * 32128 * 1024,
    layer_kv_bytes=(0,) * 24 + (2 * 2 * 1024,) * 24,
    shared_by=(0, 24, 47),
    encoder_layers=24,
)
ENCODER, DECODER = LayerRange(0, 24), LayerRange(24, 48)
SLOW, FAST = WorkerId("slow"), WorkerId("fast")
KV_TOKENS = 2048
ONE = Demand(sequences=1, positions=200, prompt_tokens=4, chunk_tokens=256)
"""A request at a time that answers a source of 256 tokens in 64."""


def machines(
    share: float, *, faster: float = 3.0, rtt_s: float = 0.001, workers: tuple[WorkerId, ...] = ()
) -> Machines:
    """Return machines of which each holds so large a share of T5-large."""
    speeds = {}
    for worker in workers or (SLOW, FAST):
        times = faster if worker == FAST else 1.0
        found = Capabilities(
            device="cpu",
            device_name="A CPU",
            platform="none",
            memory_bytes=0,
            cores=1,
            threads=1,
            memory_bandwidth_bytes_per_s=times * 10e9,
            flops_per_s=times * 300e9,
        )
        speeds[worker] = WorkerSpeed(Prior.from_capabilities(found, T5_LARGE, item_bytes=2))
    network = LinkSpeeds(bytes_per_token=4096)
    for pair in itertools.permutations(speeds, 2):
        network.observe(*pair, rtt_s=rtt_s, bytes_per_s=1e8)
    memory = dict.fromkeys(speeds, int(share * T5_LARGE.all_weight_bytes))
    return Machines(memory, speeds, network.links)


def best(
    some: Machines, demand: Demand, objective: Objective, *, cost: ModelCost = T5_LARGE
) -> LayerMap:
    found = best_forecast(cost, some, demand, objective=objective, kv_tokens=KV_TOKENS)
    assert found is not None
    return found.layer_map


def test_one_request_at_a_time_has_its_answer_written_by_the_faster_machine() -> None:
    """The slow one gets what is left, from the encoder: as few layers as memory allows."""
    some = machines(0.85)
    (first, _), (second, rest) = best(some, ONE, "latency")
    assert (first, second) == (SLOW, FAST)
    assert DECODER.start >= rest.start > 0
    assert (
        T5_LARGE.stage_bytes(LayerRange(rest.start - 1, 48), KV_TOKENS) > (some.memory_bytes[FAST])
    )


def test_decoder_layers_on_the_slower_machine_cost_more_than_encoder_layers_there() -> None:
    some, rates = machines(1.0), {}
    for name, layer_map in {
        "encoder": ((SLOW, ENCODER), (FAST, DECODER)),
        "decoder": ((FAST, ENCODER), (SLOW, DECODER)),
        "alone": ((FAST, LayerRange(0, 48)),),
    }.items():
        rates[name] = forecast(T5_LARGE, some, layer_map, ONE).alone_tokens_per_s
    assert rates["decoder"] < 0.5 * rates["encoder"]
    assert rates["encoder"] < rates["alone"]


def test_many_answers_at_once_do_not_wait_for_an_encoder_far_away_either() -> None:
    demand = Demand(sequences=8, positions=200, prompt_tokens=0, chunk_tokens=1)
    names = (SLOW, WorkerId("w1"), WorkerId("w2"))
    layer_map = tuple(zip(names, (ENCODER, LayerRange(24, 36), LayerRange(36, 48)), strict=True))
    rates = []
    for rtt_s in (0.001, 5.0):
        network = LinkSpeeds(bytes_per_token=4096)
        for pair in itertools.permutations(names, 2):
            network.observe(*pair, rtt_s=rtt_s if SLOW in pair else 0.001, bytes_per_s=1e8)
        some = replace(machines(1.0, workers=names), links=network.links)
        found = forecast(T5_LARGE, some, layer_map, demand)
        assert found.depth > 1
        rates.append(found.tokens_per_s)
    assert rates[1] == pytest.approx(rates[0])


@pytest.mark.parametrize("objective", SCORES)
def test_an_encoder_elsewhere_costs_answers_without_sources_nothing(objective: Objective) -> None:
    """Steps that decode begin at the decoder, however far away and slow the encoder is."""
    demand = Demand(sequences=1, positions=200, prompt_tokens=0, chunk_tokens=1)
    some = machines(1.0, rtt_s=5.0)
    far = forecast(T5_LARGE, some, ((SLOW, ENCODER), (FAST, DECODER)), demand)
    alone = forecast(T5_LARGE, some, ((FAST, LayerRange(0, 48)),), demand)
    assert far.score(objective) == pytest.approx(alone.score(objective))
    cut = ((SLOW, LayerRange(0, 25)), (FAST, LayerRange(25, 48)))
    assert forecast(T5_LARGE, some, cut, demand).score("latency") < 0.5


def test_an_answer_stays_on_one_machine_rather_than_on_two() -> None:
    """Three alike, of which two hold the model: the only way over a slow link is the sources'."""
    names = tuple(WorkerId(f"w{i}") for i in range(3))
    some = machines(0.8, rtt_s=0.2, workers=names)
    layer_map = best(some, ONE, "latency")
    assert all(held.start <= 24 for _, held in layer_map)


def test_a_full_pipeline_shares_what_both_kinds_of_steps_take() -> None:
    """Answers are long here: who plans as if layers were alike, has the decoder do too much."""
    demand = Demand(sequences=32, positions=200, prompt_tokens=0.25, chunk_tokens=64)
    some = machines(1.0, faster=2.0)
    found = best_forecast(T5_LARGE, some, demand, objective="throughput", kv_tokens=KV_TOKENS)
    assert found is not None
    work = demand.mean_step(16.0)
    used = predict(T5_LARGE, some.candidates(work), some.links_for(work), found.layer_map)
    assert used.total_s / 2 <= used.slowest_s < 0.6 * used.total_s
    as_decoder = ModelCost(
        *(T5_LARGE.layer_bytes, 0, T5_LARGE.last_bytes, T5_LARGE.shared_bytes),
        layer_kv_bytes=T5_LARGE.layer_kv_bytes,
    )
    other = best(some, demand, "throughput", cost=as_decoder)
    rate = forecast(T5_LARGE, some, other, demand).full_tokens_per_s
    assert found.full_tokens_per_s > 1.05 * rate


def test_many_machines_of_all_kinds_hold_it() -> None:
    names = tuple(WorkerId(f"w{i:02}") for i in range(16))
    some = machines(0.15, workers=names)
    for objective in SCORES:
        layer_map = best(some, ONE, objective)
        served = [i for _, held in layer_map for i in range(held.start, held.stop)]
        assert served == list(range(48))
        assert all(
            T5_LARGE.stage_bytes(held, KV_TOKENS) <= some.memory_bytes[worker]
            for worker, held in layer_map
        )


# ------------------------------------------------------------------ room


def test_an_encoder_without_room_to_spare_limits_no_request() -> None:
    memory = {
        SLOW: T5_LARGE.weight_bytes(ENCODER),
        FAST: T5_LARGE.stage_bytes(DECODER, KV_TOKENS),
    }
    plan = plan_of(T5_LARGE, memory, ((SLOW, ENCODER), (FAST, DECODER)))
    assert kv_tokens_of(plan) == KV_TOKENS
    assert longest_tokens_of(plan, T5_LARGE, step_tokens=256) == KV_TOKENS


def test_what_a_worker_with_encoder_layers_alone_reports_limits_no_request_either() -> None:
    memory = dict.fromkeys((SLOW, FAST), T5_LARGE.stage_bytes(DECODER, KV_TOKENS))
    plan = plan_of(T5_LARGE, memory, ((SLOW, ENCODER), (FAST, DECODER)))
    stages = tuple(
        PipelineStage(PeerId(stage.worker.encode()), stage.worker, stage.layers) for stage in plan
    )
    pipeline = Pipeline(
        *(Epoch(1), plan, stages, replace(MODEL, cost=T5_LARGE), CoordinatorSettings()),
        *(lambda: SequenceId(1), lambda changed: None),
    )
    for stage, kv_tokens, token_bytes in zip(stages, (16, 1024), (0, 1), strict=True):
        ready = StageReady(
            epoch=Epoch(1),
            credits=1,
            load_s=1.0,
            weight_bytes=1,
            kv_tokens=kv_tokens,
            kv_token_bytes=token_bytes,
        )
        pipeline.stage_ready(stage.peer, ready)
    assert pipeline.kv_tokens == pipeline.longest_tokens == 1024


def test_people_see_which_layers_are_the_encoder_s_and_which_the_decoder_s() -> None:
    workers = ("slow=1200MiB,10GB/s", "fast=1200MiB,30GB/s")
    settings = CoordinatorSettings(objective="latency", replicas=1)
    model = replace(MODEL, cost=T5_LARGE, dtype="float16")
    found = dry_run(model, workers, settings)
    (plan,) = found.plans
    rows = [stage_row(stage, found.memory[stage.worker], T5_LARGE) for stage in plan]
    last = plan[0].layers.stop
    assert [row[:2] for row in rows] == [
        ["slow", f"encoder 1-{last}"],
        ["fast", f"encoder {last + 1}-24, decoder 1-24"],
    ]
    assert rows[0][-1] == "-"
    assert "token" in rows[1][-1]
    assert found.one_tokens_per_s > 1.0


def test_the_work_of_both_stacks_is_the_whole_work() -> None:
    work = ONE.mean_step(1.0)
    both = Work.of_source(work.prompt_tokens, work.prompt_positions)
    assert both.vector[0] == 0.0
    assert (work.reading.vector + work.answering.vector == work.vector).all()
