"""Rates as people write them."""

import pytest

from distributed_llm.common.units import parse_flops, parse_rate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40GB/s", 40e9),
        ("40 gb / S", 40e9),
        ("1.5TB/s", 1.5e12),
        ("512MiB/s", 512 * 2**20),
        ("7/s", 7.0),
        ("40G/s", 40e9),
    ],
)
def test_bandwidths(text: str, expected: float) -> None:
    assert parse_rate(text) == expected


@pytest.mark.parametrize("text", ["40Gb/s", "800 Mb / s", "40Gib/s", "40Gbit/s", "9bits/s"])
def test_bits_are_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=r"in bits: .*5GB/s for 40Gb/s"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "/s", "40GB", "40GB/m", "-1GB/s", "0GB/s", "fast/s", "nan/s"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a bandwidth; .*40GB/s"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5TFLOPS", 1.5e12),
        ("800 gflops", 800e9),
        ("3GFLOPS/s", 3e9),
        ("2MFLOPS", 2e6),
        ("9kflops", 9e3),
        ("1PFLOPS", 1e15),
        ("5FLOPS", 5.0),
    ],
)
def test_speeds(text: str, expected: float) -> None:
    assert parse_flops(text) == expected


@pytest.mark.parametrize("text", ["", "1.5", "TFLOPS", "1.5TB/s", "-1TFLOPS", "0TFLOPS", "1.5TOPS"])
def test_what_is_no_speed(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a speed; .*1\.5TFLOPS"):
        parse_flops(text)
