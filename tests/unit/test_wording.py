"""Counts, units, lists and layers in the words that people read."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_llm.common.types import LayerRange
from distributed_llm.common.wording import (
    count_text,
    duration_text,
    faster_text,
    layer_map_text,
    layers_text,
    list_text,
    rate_text,
    rates_text,
    size_text,
    stacks_text,
    times_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(0, "thread"), "0 threads"),
        (count_text(1, "thread"), "1 thread"),
        (count_text(2, "thread"), "2 threads"),
        (count_text(3, "reply", "replies"), "3 replies"),
        (count_text(55_359, "token"), "55,359 tokens"),
        (count_text(9_677_888, "token"), "9.7 million tokens"),
        (times_text(1), "once"),
        (times_text(2), "twice"),
        (times_text(1000), "1,000 times"),
        (size_text(1), "1 byte"),
        (size_text(1023), "1,023 bytes"),
        (size_text(1024), "1.0 KiB"),
        (size_text(3 << 29), "1.5 GiB"),
        (size_text(5 << 40), "5120.0 GiB"),
        (duration_text(0.0), "0 ms"),
        (duration_text(0.00342), "3.4 ms"),
        (duration_text(0.12), "120 ms"),
        (duration_text(0.9996), "1.0 s"),
        (duration_text(119.9), "119.9 s"),
        (duration_text(300.0), "5 min"),
        (duration_text(7200.0), "2 h"),
        (rate_text(0.052), "0.052 tokens/s"),
        (rate_text(3.71), "3.7 tokens/s"),
        (rate_text(12_345.6), "12,346 tokens/s"),
        (rates_text(3.5, 0.9), "3.5 tokens/s with it, 0.9 without"),
        (rates_text(3.51, 3.52), "3.5 tokens/s with it and without"),
        (faster_text(0.12), "12 % faster"),
        (faster_text(7.97), "9.0 times as fast"),
        (list_text(["a"]), "a"),
        (list_text(["a", "b"]), "a and b"),
        (list_text(["a", "b", "c"]), "a, b and c"),
        (layers_text(LayerRange(0, 1)), "layer 1"),
        (layers_text(LayerRange(2, 6)), "layers 3-6"),
        (layers_text(LayerRange(2, 6), 4), "encoder 3-4 and decoder 1-2"),
        (
            layer_map_text([("pc", LayerRange(0, 3)), ("mac", LayerRange(3, 6))], 4),
            "encoder 1-3 on pc, encoder 4 and decoder 1-2 on mac",
        ),
        (layer_map_text([("pc", LayerRange(0, 6))]), "all 6 layers on pc"),
        (layer_map_text([("pc", LayerRange(0, 1))]), "its only layer on pc"),
        (
            layer_map_text(
                [("a", LayerRange(0, 2)), ("b", LayerRange(2, 5)), ("c", LayerRange(5, 8))]
            ),
            "layers 1-2 of 8 on a, 3-5 on b, 6-8 on c",
        ),
        (
            layer_map_text([("a", LayerRange(0, 1)), ("b", LayerRange(1, 2))]),
            "layer 1 of 2 on a, 2 on b",
        ),
        (stacks_text(LayerRange(2, 6), 0), "3-6"),
        (stacks_text(LayerRange(0, 24), 24), "encoder 1-24"),
        (stacks_text(LayerRange(24, 25), 24), "decoder 1"),
        (stacks_text(LayerRange(12, 27), 24), "encoder 13-24, decoder 1-3"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert text == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_every_layer_is_named_by_exactly_one_worker(sizes: list[int]) -> None:
    ends = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    shown = [str(LayerRange(start, stop)).split("-") for start, stop in pairwise(ends)]
    named = [layer for each in shown for layer in range(int(each[0]), int(each[-1]) + 1)]
    assert named == list(range(1, ends[-1] + 1))


@given(st.integers(0, 2**53))
def test_only_one_is_singular(count: int) -> None:
    assert count_text(count, "token").endswith("token") == (count == 1)
    assert re.fullmatch(r"[0-9,.]+ (million )?tokens?", count_text(count, "token"))
