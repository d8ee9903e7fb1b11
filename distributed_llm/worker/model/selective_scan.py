"""The scans of Mamba and Mamba 2 over chunks, as mixers call them by transformers' names.

Transformers' function for Mamba begins anew with every chunk; the state to go on from is told
beside the mixers' call (`going_on_from`). That for Mamba 2 computes a text in pieces of one length,
and fills up the last one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

_begun: ContextVar[Iterator[Tensor] | None] = ContextVar("begun", default=None)


@contextmanager
def going_on_from(state: Tensor | None) -> Iterator[None]:
    """Have scans in this context go on from a state; None: their sequences begin.

    Args:
        state: [sequences, channels, size]; or [sequences, heads, channels, size], if a mixer scans
            head by head.
    """
    by_head = None if state is None else iter(state.unbind(1) if state.dim() == 4 else (state,))
    token = _begun.set(by_head)
    try:
        yield
    finally:
        _begun.reset(token)


def scan_from_states(of_transformers: Callable[..., Any]) -> Callable[..., Any]:
    """Return what computes what `of_transformers` does, but goes on from a state that was told."""

    def scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any
    ) -> Any:
        states = _begun.get()
        if states is None:
            return of_transformers(hidden_states, dt, A, B, C, **kwargs)
        return _scan(next(states), hidden_states, dt, A, B, C, **kwargs)

    return scan


def scan_in_short_pieces(of_transformers: Callable[..., Any]) -> Callable[..., Any]:
    """Return what computes what Mamba 2's scan does, in pieces no longer than the text."""

    def scan(hidden_states: Tensor, *args: Tensor, chunk_size: int, **kwargs: Any) -> Any:
        size = min(chunk_size, hidden_states.shape[1])
        return of_transformers(hidden_states, *args, chunk_size=size, **kwargs)

    return scan


def _scan(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the outputs [sequences, channels, tokens] and the state after the last token.

    Args:
        state: [sequences, channels, size] before the first one.
        hidden_states: [sequences, channels, tokens].
        dt: of the same shape: time steps before their bias and softplus.
        A: [channels, size], how fast the state fades.
        B: [sequences, size, tokens], what goes into it.
        C: [sequences, size, tokens], what is read of it.
        D: [channels], what passes it by.
        z: [sequences, channels, tokens], gates of the outputs.
        delta_bias: [channels].
        kwargs: for other implementations.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    steps = softplus(dt)
    outputs = []
    for token in range(hidden_states.shape[-1]):
        step = steps[:, :, token, None]
        added = step * B[:, None, :, token].float() * hidden_states[:, :, token, None].float()
        state = torch.exp(A * step) * state + added
        read = C[:, :, token, None]
        outputs.append(torch.matmul(state.to(hidden_states.dtype), read)[:, :, 0])
    output = torch.stack(outputs, dim=-1) + hidden_states * D[:, None]
    return output * silu(z), state
