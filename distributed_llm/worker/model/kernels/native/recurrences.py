"""One token's step of convolutions and recurrences that layers keep as states, by the C library."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_llm.worker.model.kernels.native import library
from distributed_llm.worker.model.kernels.native.attention import address
from distributed_llm.worker.model.kernels.native.calls import (
    ConvolutionCall,
    RecurrenceCall,
    tell,
)
from distributed_llm.worker.model.kernels.native.norms import EIGHT, can_compute

_MOST_KEY_DIM = 256


def can_convolve(columns: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `convolve` takes new columns [sequences, channels, tokens], and the rest."""
    others = (window, weight) if bias is None else (window, weight, bias)
    return (
        columns.shape[-1] == 1
        and can_compute(columns[..., 0])
        and all(other.dtype == torch.bfloat16 for other in others)
        and window.is_contiguous()
        and window.shape[-1] >= max(1, weight.shape[-1] - 1)
    )


def convolve(
    columns: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool
) -> Tensor:
    """Return the convolution of one new column behind those of a window, which moves on.

    Args:
        columns: bfloat16 [sequences, channels, 1]; see `can_convolve`.
        window: bfloat16 [sequences, channels, columns]; written.
        weight: bfloat16 [channels, width].
        bias: bfloat16 [channels], or None.
        silu: whether that is applied to what is rounded.

    Returns:
        bfloat16 [sequences, channels, 1].
    """
    weight = weight.contiguous()
    output = columns.new_empty(columns.shape[:2])
    sizes = array("q", (*window.shape, weight.shape[-1], *columns.stride()[:2]))
    library.loaded().convolve(
        *map(address, (columns, window, weight, bias, output)), sizes.buffer_info()[0], silu
    )
    tell(ConvolutionCall(columns, window, weight, bias, output, sizes, silu))
    return output[..., None]


def can_update(state: Tensor, *others: Tensor) -> bool:
    """Return whether `delta_rule` and `selective_update` take a state and other tensors.

    Args:
        state: [sequences, heads, rows, columns].
        others: bfloat16, what is read beside it; in the last dimension `columns`, or others.
    """
    return (
        state.dtype == torch.float32
        and state.is_contiguous()
        and state.shape[-1] % EIGHT == 0
        and all(other.dtype == torch.bfloat16 for other in others)
        and can_compute(others[0])
    )


def can_apply_delta_rule(query: Tensor, value: Tensor, beta: Tensor, state: Tensor) -> bool:
    """Return whether `delta_rule` takes these."""
    return can_update(state, query, value, beta) and query.shape[-1] <= _MOST_KEY_DIM


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, fading: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what one token of each sequence reads of a state that it has changed, and that state.

    Queries and keys are divided by their length, and queries by the root of it too.

    Args:
        query: bfloat16 [sequences, key_heads, key_dim]; see `can_apply_delta_rule`.
        key: likewise.
        value: bfloat16 [sequences, heads, value_dim].
        fading: float32 [sequences, heads] or [sequences, heads, key_dim], logarithms.
        beta: bfloat16 [sequences, heads].
        state: float32 [sequences, heads, key_dim, value_dim].

    Returns:
        bfloat16 [sequences, heads, value_dim], and the new state.
    """
    query, key, value = (_in_rows(states) for states in (query, key, value))
    fading, beta = fading.contiguous(), beta.contiguous()
    sequences, heads, key_dim, value_dim = state.shape
    fades = fading.shape[2] if fading.dim() == 3 else 1
    steps = [states.stride(0) for states in (query, key, value)]
    sizes = [sequences, query.shape[1], heads, key_dim, value_dim, *steps, fades]
    read = query, key, value, fading, beta
    return _made("delta_rule", read, state, (sequences, heads, value_dim), sizes)


def selective_update(
    state: Tensor,
    inputs: Tensor,
    times: Tensor,
    writing: Tensor,
    reading: Tensor,
    fading: Tensor,
    *,
    gates: Tensor | None,
    bias: Tensor | None,
    passing: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what one token of each sequence makes of a state, and the new state.

    Args:
        state: float32 [sequences, heads, channels, size]; see `can_update`.
        inputs: bfloat16 [sequences, heads, channels].
        times: bfloat16 [sequences, heads], steps of time before their bias and softplus.
        writing: bfloat16 [sequences, groups, size], what goes into the state.
        reading: likewise, what is read of it.
        fading: float32 [heads, 1] or [heads, size], how fast it fades.
        gates: bfloat16 as inputs, of the outputs; or None.
        bias: [heads] of the times, or None.
        passing: [heads], how much of the inputs passes by the state; or None.

    Returns:
        bfloat16 [sequences, heads, channels], and the new state.
    """
    inputs, writing, reading = (_in_rows(states) for states in (inputs, writing, reading))
    gates = None if gates is None else _in_rows(gates)
    times = times if times.stride(1) == 1 else times.contiguous()
    fading = fading.contiguous()
    bias, passing = (
        None if each is None else each.float().contiguous() for each in (bias, passing)
    )
    steps = [each.stride(0) for each in (inputs, times, writing, reading)]
    steps.append(0 if gates is None else gates.stride(0))
    sizes = [*state.shape, writing.shape[1], *steps, fading.shape[1]]
    read = inputs, times, writing, reading, gates, fading, bias, passing
    return _made("selective_update", read, state, tuple(inputs.shape), sizes)


def _made(
    function: str,
    read: tuple[Tensor | None, ...],
    state: Tensor,
    shape: tuple[int, ...],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    made = torch.empty_like(state)
    output = state.new_empty(shape, dtype=torch.bfloat16)
    call = RecurrenceCall(function, read, state, made, output, array("q", sizes))
    getattr(library.loaded(), function)(
        *map(address, (*read, state, made, output)),
        *(call.sizes.buffer_info()[0], torch.get_num_threads()),
    )
    tell(call)
    return output, made


def _in_rows(states: Tensor) -> Tensor:
    """Return states [sequences, heads, numbers] of which those of a sequence follow one another."""
    _, heads, numbers = states.shape
    in_rows = (numbers == 1 or states.stride(2) == 1) and (
        heads == 1 or states.stride(1) == numbers
    )
    return states if in_rows else states.contiguous()
