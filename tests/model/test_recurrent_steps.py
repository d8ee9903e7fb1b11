"""The C library's steps of convolutions and recurrences compute what transformers' functions do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bamba.modeling_bamba import mamba2_selective_state_update
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_state_update
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from distributed_llm.worker.model.convolution import causal_conv1d_update
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native import recurrences
from distributed_llm.worker.model.recurrent_steps import RECURRENT_STEPS, lending

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)

SEQUENCES = 3
CLOSE: dict[str, Any] = {"rtol": 2**-7, "atol": 2**-7}
"""Outputs are rounded to bfloat16 once."""


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def step_of(name: str, function: Any) -> Any:
    """Return our step for one of transformers' functions, which is not to be called."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"{function} is called")

    return RECURRENT_STEPS[name](refuse)


@pytest.mark.parametrize(("columns", "width"), [(4, 4), (3, 3), (3, 4), (6, 4), (1, 2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_window_moves_on(
    columns: int, width: int, biased: bool, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 40
    new = narrow(SEQUENCES, 1, 2 * channels)[..., channels:].transpose(1, 2)
    window, weight = narrow(SEQUENCES, channels, columns), narrow(channels, width)
    bias = narrow(channels) if biased else None
    both = torch.cat([window, new], dim=-1)
    expected = nn.functional.conv1d(
        both[..., -width:].float(),
        weight[:, None].float(),
        None if bias is None else bias.float(),
        groups=channels,
    )
    if activation:
        expected = nn.functional.silu(expected)
    monkeypatch.setattr(torch, "cat", None)  # which is what is done without the library
    made = causal_conv1d_update(new, window, weight, bias, activation)
    torch.testing.assert_close(made.float(), expected, **CLOSE)
    assert torch.equal(window, both[..., 1:])


def test_windows_of_other_dtypes_are_torchs() -> None:
    window, weight = torch.randn(1, 8, 4), torch.randn(8, 4)
    made = causal_conv1d_update(narrow(1, 8, 1), window.bfloat16(), weight, None)
    assert made.isfinite().all()
    assert not recurrences.can_convolve(narrow(1, 8, 1), window, weight.bfloat16(), None)
    assert not recurrences.can_convolve(narrow(1, 8, 2), window.bfloat16(), weight.bfloat16(), None)


@pytest.mark.parametrize("by_number", [False, True])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(2, 8, 8), (6, 24, 40), (8, 64, 128)])
def test_the_delta_rule(heads: int, key_dim: int, value_dim: int, by_number: bool) -> None:
    """Heads may share their keys, and a state fades in one way or in one for each of these."""
    key_heads = heads if by_number else heads // 2
    wide = narrow(SEQUENCES, 1, heads * (2 * key_dim + value_dim))
    query, key = (
        wide[..., at : at + key_heads * key_dim].reshape(SEQUENCES, 1, key_heads, key_dim)
        for at in (0, heads * key_dim)
    )
    value = wide[..., 2 * heads * key_dim :].reshape(SEQUENCES, 1, heads, value_dim)
    fading = -torch.rand((SEQUENCES, 1, heads, *([key_dim] if by_number else [])))
    beta = torch.rand(SEQUENCES, 1, heads).bfloat16()
    state = torch.randn(SEQUENCES, heads, key_dim, value_dim)
    before = state.clone()
    name, function = (
        ("recurrent_kimi_delta_attention", recurrent_kimi_delta_attention)
        if by_number
        else ("torch_recurrent_gated_delta_rule", torch_recurrent_gated_delta_rule)
    )
    told = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    wide_inputs = (each.float() for each in (query, key, value, fading, beta))
    expected, after = function(*wide_inputs, **told)
    output, made = step_of(name, function)(query, key, value, g=fading, beta=beta, **told)
    torch.testing.assert_close(output.float(), expected, **CLOSE)
    torch.testing.assert_close(made, after, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, before)
    told["initial_state"] = state[1:2]
    alone = (each[1:2] for each in (query, key, value, fading, beta))
    output_alone, made_alone = step_of(name, function)(*alone, **told)
    assert torch.equal(output_alone, output[1:2])
    assert torch.equal(made_alone, made[1:2])


def given(*shape: int) -> dict[str, Tensor]:
    """Return arguments of a selective update, for so many heads, channels, states and groups."""
    heads, channels, size, groups = shape
    return {
        "hidden_states": narrow(SEQUENCES, heads, channels),
        "dt": narrow(SEQUENCES, heads, 1).expand(-1, -1, channels),
        "A": (-torch.rand(heads) * 4)[:, None, None].expand(-1, channels, size),
        "B": narrow(SEQUENCES, groups, size),
        "C": narrow(SEQUENCES, groups, size),
        "D": narrow(heads, 1).expand(-1, channels),
        "z": narrow(SEQUENCES, heads, channels),
        "dt_bias": narrow(heads, 1).expand(-1, channels),
    }


def by_channel(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return arguments for Mamba's channels, which fade in ways of their own."""
    flat = {name: arguments[name][..., 0] for name in ("hidden_states", "dt", "D", "z", "dt_bias")}
    columns = {name: arguments[name][:, 0] for name in ("B", "C")}
    rows = arguments["A"][:, 0]
    return {**flat, **columns, "A": rows * torch.linspace(0.5, 2, rows.shape[1])}


@pytest.mark.parametrize("left_out", [(), ("z", "dt_bias")])
@pytest.mark.parametrize("shape", [(4, 8, 8, 2), (6, 3, 24, 1), (64, 16, 64, 8), (80, 1, 16, 1)])
def test_a_selective_update(shape: tuple[int, ...], left_out: tuple[str, ...]) -> None:
    arguments, state = given(*shape), torch.randn(SEQUENCES, *shape[:3])
    name, function = "mamba2_selective_state_update", mamba2_selective_state_update
    if shape[1] == 1:
        arguments, state = by_channel(arguments), state[:, :, 0].contiguous()
        name, function = "mamba_selective_state_update", mamba_selective_state_update
    more: dict[str, Any] = {"dt_softplus": True, **dict.fromkeys(left_out)}
    after, before = state.clone(), state.clone()
    taken: list[Tensor] = []
    wide = {at: each.float() for at, each in arguments.items()}
    expected = function(after, **{**wide, **more})
    with lending(taken.append):
        output = step_of(name, function)(state, **{**arguments, **more})
    torch.testing.assert_close(output.float(), expected, rtol=2**-6, atol=2**-5)
    torch.testing.assert_close(taken[0], after, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, before)


def test_transformers_functions_get_a_copy_of_a_state_that_is_lent() -> None:
    arguments, state = given(4, 8, 8, 2), torch.randn(SEQUENCES, 4, 8, 8)
    arguments = {name: each.float() for name, each in arguments.items()}
    step = RECURRENT_STEPS["mamba2_selective_state_update"](mamba2_selective_state_update)
    before = state.clone()
    taken: list[Tensor] = []
    with lending(taken.append):
        lent = step(state, **arguments, dt_softplus=True)
    assert torch.equal(state, before)
    assert torch.equal(step(state, **arguments, dt_softplus=True), lent)
    assert torch.equal(state, taken[0])
