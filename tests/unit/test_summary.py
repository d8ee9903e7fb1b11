"""The sentences of `dllm status`: their grammar, their units, and that they say what is so."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm import summary
from distributed_llm.common.messages import ClusterStatus, EventStatus, PipelineStatus
from distributed_llm.common.types import Epoch, LayerRange
from tests.grammar import faults_of
from tests.wire.test_status_command import status, worker


def lines(shown: ClusterStatus) -> list[str]:
    return [summary.headline(shown), *summary.request_lines(shown)]


def test_what_serves_and_how_full_it_is() -> None:
    two = status(worker("a", layers=LayerRange(0, 20)), worker("b", layers=LayerRange(20, 36)))
    assert lines(two) == [
        "Qwen/Qwen3-8B (36 layers): serving plan 3; 1,024 of 65,536 tokens of context in use",
        "answers: 1 running, 0 waiting; requests: 2 finished, 0 cancelled, 0 failed; "
        "77 tokens generated",
    ]


def test_two_plans_serve_the_whole_model_each() -> None:
    whole = LayerRange(0, 36)
    both = status(worker("a", layers=whole, epoch=1), worker("b", layers=whole, epoch=2))
    assert "serving plans 1 and 2, each the whole model;" in summary.headline(both)


def test_a_context_that_is_kept_in_few_bits() -> None:
    pipeline = PipelineStatus(
        epoch=Epoch(3),
        lineage=Epoch(3),
        kv_dtype="int8",
        state="serving",
        stages=(),
        links=(),
        kv_tokens=65_536,
    )
    shown = status(worker("a", layers=LayerRange(0, 36)), pipelines=(pipeline,))
    assert summary.headline(shown).endswith("65,536 tokens of context in use, kept in int8")


def test_by_what_gpus_multiply() -> None:
    shown = status(worker("a"), worker("b", kernels="int8 by int8pack and blocks"))
    assert summary.kernel_lines(shown) == ["b multiplies int8 by int8pack and blocks"]


def test_nothing_is_said_of_plans_where_none_is_loaded() -> None:
    waiting = status(worker("a", state="unfit"), state="waiting", epoch=7)
    assert summary.headline(waiting) == "Qwen/Qwen3-8B (36 layers): waiting"


@pytest.mark.parametrize(
    ("moves", "stall_s", "expected"),
    [
        (0, 0.0, None),
        (2, 0.0, "layers moved twice"),
        (1, 0.0421, "layers moved once; the latest move stopped answers for 42 ms"),
    ],
)
def test_moves_stop_nobody_while_nothing_runs(
    moves: int, stall_s: float, expected: str | None
) -> None:
    shown = [line for line in lines(status(moves=moves, move_stall_s=stall_s)) if "moved" in line]
    assert shown == ([expected] if expected else [])


def test_what_happened_again_says_how_often() -> None:
    event = EventStatus(
        number=9,
        kind="worker_lost",
        level="warning",
        text="worker a fell silent",
        age_s=10,
        epoch=Epoch(0),
    )
    assert summary.event_line(event) == "worker a fell silent"
    again = msgspec.structs.replace(event, times=3)
    assert summary.event_line(again) == "worker a fell silent (3 times, the last time 10.0 s ago)"


counts = st.integers(0, 3) | st.integers(0, 2**40)


@given(st.lists(counts, min_size=11, max_size=11))
def test_grammar(numbers: list[int]) -> None:
    shown = status(worker("a", layers=LayerRange(0, 1)))
    names = [name for name in shown.__struct_fields__ if isinstance(getattr(shown, name), int)]
    varied = dict(zip(names, numbers, strict=False))
    varied["num_layers"] = max(1, varied["num_layers"])
    for line in lines(msgspec.structs.replace(shown, **varied)):
        assert faults_of(line) == [], line
