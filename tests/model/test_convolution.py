"""Our convolutions of windows compute what torch's do."""

import pytest
import torch
from torch import nn

from distributed_llm.worker.model.convolution import (
    DilatedConvolution,
    causal_conv1d_fn,
    causal_conv1d_update,
)

CHANNELS, WIDTH = 6, 4


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [False, True])
def test_columns_are_convolved_with_those_before_them(activation: str | None, biased: bool) -> None:
    draw = torch.Generator().manual_seed(5)
    columns = torch.randn(2, CHANNELS, 11, generator=draw)
    weight = torch.randn(CHANNELS, WIDTH, generator=draw)
    bias = torch.randn(CHANNELS, generator=draw) if biased else None
    expected = nn.functional.conv1d(
        columns, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS
    )[..., :11]
    if activation:
        expected = nn.functional.silu(expected)
    whole = causal_conv1d_fn(columns, weight, bias, activation)
    torch.testing.assert_close(whole, expected)
    for size in (WIDTH - 1, WIDTH, 6):
        window = columns[..., 8 - size : 8].clone()
        rest = causal_conv1d_update(columns[..., 8:], window, weight, bias, activation)
        torch.testing.assert_close(rest, expected[..., 8:])
        assert torch.equal(window, columns[..., 11 - size :])


@pytest.mark.parametrize("apart", [1, 3])
def test_columns_may_be_some_way_apart(apart: int) -> None:
    torch.manual_seed(7)
    convolution = nn.Conv1d(
        CHANNELS, CHANNELS, kernel_size=WIDTH, dilation=apart, groups=CHANNELS, bias=False
    )
    columns = torch.randn(2, CHANNELS, 3 * apart + 5)
    with torch.inference_mode():
        torch.testing.assert_close(DilatedConvolution(convolution)(columns), convolution(columns))


def test_sums_are_made_in_float32() -> None:
    columns = torch.full((1, 1, WIDTH), 1.0, dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, 1.0, 1.0, 1.0]]).to(torch.bfloat16)
    assert causal_conv1d_fn(columns, weight)[0, 0, -1] == 260
