"""What steps of encoder-decoders teach: sources of encoder layers, answers of decoder layers."""

from collections.abc import Sequence

import pytest

from distributed_llm.common.messages import (
    Capabilities,
    LinkReport,
    SequenceSlice,
    StageTime,
    StageTrial,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.partition.tables import WorkerTimes
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Request
from distributed_llm.coordinator.requests.stage_times import StageTimes
from distributed_llm.coordinator.serving.depth_policy import DepthPolicy
from distributed_llm.coordinator.serving.step import Step
from distributed_llm.coordinator.serving.step_meter import StepMeter
from distributed_llm.coordinator.serving.steps import StepDone
from distributed_llm.coordinator.speeds.demand import DemandMeter
from distributed_llm.coordinator.speeds.measurements import Measurements
from distributed_llm.coordinator.speeds.work import Work, work_of

COST = ModelCost(
    (1_000_000, 1_000_000, 3_000_000, 3_000_000),
    *(0, 400_000, 0, (0, 0, 1000, 1000)),
    encoder_layers=2,
)
ENCODER, DECODER = 0.5, 1.5
"""Layers of mean size that a layer of each stack is."""

FOUND = Capabilities(
    device="cpu",
    device_name="A CPU",
    platform="none",
    memory_bytes=10_000_000,
    cores=2,
    threads=2,
    memory_bandwidth_bytes_per_s=1e9,
    flops_per_s=1e10,
)
A, B = WorkerId("a"), WorkerId("b")
SOURCE_S, ANSWER_S, ACROSS_S = 0.03, 0.008, 0.07
"""Seconds of an encoder layer of mean size for `SOURCE`, of a decoder layer for a token, and of the
decoder's stage for `SOURCE`."""

TASK_S = 0.001
N = 40
SOURCE = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=N, source=N)
TOKEN = SequenceSlice(sequence_id=SequenceId(1), start=N, num_tokens=1, source=N, sample=True)
AGAIN = SequenceSlice(sequence_id=SequenceId(1), start=N, num_tokens=5, source=N, sample=True)
MIXED = Work(1, N + 1, prompts=0.5, prompt_tokens=0.5 * N, prompt_positions=0.5 * N * N)
"""A token of an answer, and a source for every other one."""


def stages(*stops: int) -> tuple[PipelineStage, ...]:
    edges = zip((0, *stops), (*stops, 4), "ab", strict=False)
    return tuple(
        PipelineStage(PeerId(name.encode()), WorkerId(name), LayerRange(start, stop))
        for start, stop, name in edges
    )


APART = stages(2)


def known() -> Measurements:
    made = Measurements(COST, item_bytes=2, bytes_per_token=1000)
    made.joined(A, FOUND)
    made.joined(B, FOUND)
    return made


def taken(layers_s: float, task_s: float = TASK_S) -> StageTime:
    compute_us = round(1e6 * (layers_s + task_s))
    return StageTime(compute_us=compute_us, layers_us=round(1e6 * layers_s), queued_us=0)


def ended(
    part: SequenceSlice, *timings: StageTime, first: int = 0, outside_s: float = 0.0
) -> StepDone:
    inside_s = sum(timing.compute_us for timing in timings) / 1e6
    step = Step((), (part,), (7,) * part.num_tokens)
    return StepDone(step, [], [], timings, 1, inside_s + outside_s, first=first)


def source_read(slower: float = 1.0) -> StepDone:
    """Return a step through an encoder and a decoder on different workers."""
    return ended(SOURCE, taken(slower * SOURCE_S * 2 * ENCODER), taken(ACROSS_S))


def token_written(slower: float = 1.0) -> StepDone:
    return ended(TOKEN, taken(slower * ANSWER_S * 2 * DECODER, TASK_S + 0.002), first=1)


def serve(made: Measurements, rounds: int, *done: StepDone) -> None:
    for at in range(rounds):
        for number, one in enumerate(done):
            made.observe(APART, one, now=0.2 * at + 0.1 * number)


def times(made: Measurements, worker: WorkerId, work: Work = MIXED) -> WorkerTimes:
    return made.machines({worker: 1}).speeds[worker].times(work)


# ------------------------------------------------------------------ work


def test_what_steps_compute() -> None:
    def work(*parts: SequenceSlice) -> Work:
        return work_of(Step((), parts, (0,) * sum(part.num_tokens for part in parts)))

    short = SequenceSlice(sequence_id=SequenceId(2), start=0, num_tokens=3, source=3)
    assert work(SOURCE, short) == Work.of_source(N + 3, N * N + 9)
    assert work(SOURCE).vector.tolist() == [0, 0, 0, 1, N, N * N]
    assert work(TOKEN) == Work(1, N + 1)
    assert work(TOKEN, AGAIN) == Work(6, N + 1 + sum(N + i for i in range(1, 6)))


def test_a_source_of_one_token_is_no_token_of_an_answer() -> None:
    part = SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=1, source=1)
    assert not Step((), (part,), (7,)).decodes
    assert Step((), (TOKEN,), (7,)).decodes


def test_sources_are_the_prompts_that_are_asked_for() -> None:
    request = Request((PeerId(b"client"), "r", 0), SamplingParams(), 0.0, client="client")
    request.accept(range(N), Limits((Sampling(),), 8, ()), number=0)
    meter = DemandMeter(half_life_s=1000.0)
    for at in range(20):
        parts = (SOURCE,) if at % 5 == 0 else (AGAIN if at % 5 == 1 else TOKEN,)
        tokens = (7,) * parts[0].num_tokens
        step = Step(tuple(request.answers), parts, tokens)
        meter.observe(StepDone(step, [], [], (), 1, 0.1), decoding=1, now=0.1 * at)
    demand = meter.demand
    assert demand is not None
    assert demand.prompt_tokens == pytest.approx(N / 8, rel=0.1)  # as long as answers may become
    assert demand.chunk_tokens == pytest.approx(N)
    assert demand.positions == pytest.approx(N + 2, rel=0.02)


# ------------------------------------------------------------------ steps


def test_each_stack_teaches_of_its_own_layers() -> None:
    made = known()
    serve(made, 60, source_read(), *[token_written()] * 2)
    assert times(made, A).source_s == pytest.approx(SOURCE_S / 2, rel=0.02)
    assert times(made, A).task_s == pytest.approx(TASK_S / 2, rel=0.1)
    assert times(made, B).layer_s == pytest.approx(ANSWER_S, rel=0.02)
    assert made.error(A) == pytest.approx(0.0, abs=0.02)
    assert made.error(B) == pytest.approx(0.0, abs=0.02)


def test_what_one_stack_takes_is_known_from_the_other_by_the_scale_of_the_machine() -> None:
    """B is so many times as slow as its probe says, in its decoder layers; no encoder was there."""
    made = known()
    prior = made.machines({B: 1}).speeds[B].times(MIXED)
    serve(made, 60, source_read(), token_written())
    slower = times(made, B).layer_s / prior.layer_s
    assert slower > 2.0
    assert times(made, B).source_s == pytest.approx(slower * prior.source_s, rel=0.01)


def test_steps_that_decode_are_of_the_last_stages() -> None:
    made = known()
    assert made.observe(APART, source_read(), now=0.0) == [None, None]
    assert made.observe(APART, token_written(), now=0.1) == [None, None]
    expected = made.observe(APART, token_written(), now=0.2)
    assert expected[0] is None
    assert expected[1] == pytest.approx(ANSWER_S * 2 * DECODER + TASK_S + 0.002, rel=0.05)
    again = made.observe(APART, source_read(), now=0.3)
    assert again[0] == pytest.approx(SOURCE_S * 2 * ENCODER + TASK_S, rel=0.05)
    assert again[1] is None  # what a decoder does for a source is not predicted
    assert made.untried(A) is False


def test_a_stage_with_layers_of_both_stacks_divides_each_by_its_own() -> None:
    made, (whole,) = known(), stages()[:1]
    whole = PipelineStage(whole.peer, A, LayerRange(1, 4))
    for at in range(60):
        lengths = ENCODER + 2 * DECODER / 8  # keys and values of attention across
        made.observe((whole,), ended(SOURCE, taken(SOURCE_S * lengths)), now=0.2 * at)
        answer = ended(TOKEN, taken(ANSWER_S * 2 * DECODER, 0.004))
        made.observe((whole,), answer, now=0.2 * at + 0.1)
    assert times(made, A).source_s == pytest.approx(SOURCE_S / 2, rel=0.02)
    assert times(made, A).layer_s == pytest.approx(ANSWER_S, rel=0.02)
    both = times(made, A)
    assert both.task_s + both.answer_s + both.last_s == pytest.approx(0.004 + TASK_S / 2, rel=0.05)
    no_sources = times(made, A, Work(1, N + 1))
    assert (no_sources.task_s, no_sources.source_s) == (0.0, 0.0)


def test_a_machine_that_slows_down_does_so_for_both() -> None:
    made = known()
    serve(made, 40, source_read(), token_written())
    before = times(made, B).source_s
    for at in range(8):
        made.observe(APART, token_written(5.0), now=8.0 + 0.1 * at)
    assert times(made, B).layer_s == pytest.approx(5 * ANSWER_S, rel=0.05)
    assert times(made, B).source_s == pytest.approx(5 * before, rel=0.05)


def test_a_link_that_a_step_did_not_take_is_not_bounded_by_it() -> None:
    made = known()
    report = LinkReport(epoch=Epoch(1), up=True, rtt_s=2.0, bytes_per_s=1e9)
    made.observe_link(A, B, report)
    made.observe(APART, token_written(), now=0.0)
    assert made.link(A, B) == (1.0, 1e9)
    made.observe(APART, source_read(), now=0.1)
    assert made.link(A, B) == (0.0, 1e9)


# ------------------------------------------------------------------ trials


def trials(encoder: float, decoder: float) -> list[StageTrial]:
    """Return trials of a stage with layers of these lengths, whose times grow with the tokens."""
    made = []
    for n in (1, 4, 16):
        if encoder:
            source_s = SOURCE_S * (0.5 + 8 * n / N / 2) * encoder
            made.append(
                StageTrial(
                    sequences=1,
                    start=0,
                    num_tokens=8 * n,
                    time=taken(source_s),
                    is_source=True,
                )
            )
        for sequences, start in ((n, 8), (1, 8 * n)):
            answer_s = ANSWER_S * (0.9 + sequences / 10) * decoder
            made += [
                StageTrial(
                    sequences=sequences,
                    start=start,
                    num_tokens=1,
                    time=taken(answer_s, 0.003),
                )
            ] * (decoder > 0)
    return made


@pytest.mark.parametrize(
    ("held", "encoder", "decoder"),
    [
        (LayerRange(0, 2), 2 * ENCODER, 0.0),
        (LayerRange(2, 4), 0.0, 2 * DECODER),
        (LayerRange(1, 3), ENCODER + DECODER / 8, DECODER),
    ],
)
def test_trials_tell_what_the_layers_of_a_stage_take(
    held: LayerRange, encoder: float, decoder: float
) -> None:
    made = known()
    made.tried(A, held, trials(encoder, decoder), now=0.0)
    assert not made.untried(A)
    found = made.machines({A: 1}).speeds[A]
    if encoder:
        work = Work(4, 4 * N, prompts=1, prompt_tokens=N, prompt_positions=N * N)
        assert found.times(work).source_s == pytest.approx(SOURCE_S, rel=0.1)
    if decoder:
        for tokens in (1, 8):
            expected = pytest.approx(ANSWER_S * (0.9 + tokens / 10), rel=0.1)
            assert found.times(Work(tokens, tokens * N)).layer_s == expected


# ------------------------------------------------------------------ stages that steps do not reach


def test_an_encoder_is_idle_while_answers_are_written() -> None:
    meter = StepMeter(2)
    meter.observe(source_read(), [None, None], now=1.0)
    for at in range(3):
        meter.observe(token_written(), [None, 0.02], now=2.0 + at)
    answer_s = ANSWER_S * 2 * DECODER + TASK_S + 0.002
    assert meter.step_s == pytest.approx([0.0, answer_s])
    assert meter.queued_s == [0.0, 0.0]
    assert meter.predicted_s == [None, pytest.approx(0.02)]
    assert meter.compute_s == pytest.approx(
        [SOURCE_S * 2 * ENCODER + TASK_S, ACROSS_S + TASK_S + 3 * answer_s]
    )
    assert meter.tokens == [N, N + 3]
    assert meter.slowest == 1


def test_an_answer_counts_the_tasks_that_each_stage_did_for_it() -> None:
    answer_times = StageTimes()
    steps: Sequence[StepDone] = [source_read(), token_written(), token_written()]
    for done in steps:
        answer_times.add(Epoch(1), APART, done.timings, done.first)
    encoder, decoder = StageTimes.sums([answer_times])
    assert (encoder.worker, encoder.tasks) == (A, 1)
    assert encoder.compute_s == pytest.approx(SOURCE_S * 2 * ENCODER + TASK_S)
    assert (decoder.worker, decoder.tasks) == (B, 3)


def test_the_pace_of_a_pipeline_is_that_of_its_decoder() -> None:
    policy = DepthPolicy(2, num_machines=2, max_tokens=64)
    for at in range(9):
        policy.observe(source_read(), now=at)
        policy.observe(token_written(), now=at + 0.5)
    assert policy.seconds_per_token == pytest.approx(ANSWER_S * 2 * DECODER + TASK_S + 0.002)
    assert policy.decode_depth(1, limit=2, now=9.0) == 1
