"""One token's step of recurrences, as mixers call it by transformers' names.

In bfloat16 the C library computes it: what transformers does with a dozen operations, each of which
reads and writes all of a state. States that mixers get are not theirs to write. Functions that
would write them are given copies; the library makes new ones.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from distributed_llm.worker.model.kernels.native.recurrences import (
    can_apply_delta_rule,
    can_update,
    delta_rule,
    selective_update,
)

_take: ContextVar[Callable[[Tensor], None] | None] = ContextVar("take", default=None)

_Function = Callable[..., Any]


@contextmanager
def lending(take: Callable[[Tensor], None] | None) -> Iterator[None]:
    """Have functions in this context leave states as they are, and give new ones to `take`.

    None: states are the mixers' own, to be written.
    """
    token = _take.set(take)
    try:
        yield
    finally:
        _take.reset(token)


def _by_delta_rule(of_transformers: _Function) -> _Function:
    def step(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        *,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        fits = use_qk_l2norm_in_kernel and query.shape[1] == 1
        if not fits or not can_apply_delta_rule(query, value, beta, initial_state):
            normed = use_qk_l2norm_in_kernel
            kwargs |= {"initial_state": initial_state, "use_qk_l2norm_in_kernel": normed}
            made: tuple[Tensor, Tensor] = of_transformers(query, key, value, g, beta, **kwargs)
            return made
        query, key, value, fading, beta = (each[:, 0] for each in (query, key, value, g, beta))
        output, state = delta_rule(query, key, value, fading.float(), beta, initial_state)
        return output[:, None], state

    return step


def _by_selection(of_transformers: _Function) -> _Function:
    """Mamba's, whose channels fade each in its own way; and Mamba 2's, where those of a head do."""

    def step(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        *,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        **kwargs: Any,
    ) -> Tensor:
        take = _take.get()
        if take is not None and dt_softplus and can_update(state, B, C, hidden_states, dt):
            by_head = state.dim() == 4
            select = _of_heads if by_head else _of_channels
            output, made = select(state, hidden_states, dt, A, B, C, D, z, dt_bias)
        else:
            made = state if take is None else state.clone()
            kwargs |= {"z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
            output = of_transformers(made, hidden_states, dt, A, B, C, D, **kwargs)
        if take is not None:
            take(made)
        return output

    return step


def _of_heads(
    state: Tensor,
    states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute with what is the same for all channels of a head, of which it has been made."""
    bias = None if bias is None else bias[:, 0]
    return selective_update(
        *(state, states, dt[..., 0], B, C, A[:, 0, :1]), gates=z, bias=bias, passing=D[:, 0]
    )


def _of_channels(
    state: Tensor,
    states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute with heads of one channel."""
    gates = None if z is None else z[..., None]
    output, made = selective_update(
        *(state[:, :, None], states[..., None], dt, B[:, None], C[:, None], A),
        gates=gates,
        bias=bias,
        passing=D,
    )
    return output[..., 0], made[:, :, 0]


RECURRENT_STEPS: Mapping[str, Callable[[_Function], _Function]] = {
    "torch_recurrent_gated_delta_rule": _by_delta_rule,
    "recurrent_kimi_delta_attention": _by_delta_rule,
    "mamba_selective_state_update": _by_selection,
    "mamba2_selective_state_update": _by_selection,
}
"""Functions that mixers call for one token, each with what makes ours of it."""

_DIMENSIONS = {name: 3 if name == "mamba_selective_state_update" else 4 for name in RECURRENT_STEPS}


def lent_dimensions(names: Collection[str]) -> int:
    """Return the dimensions of a state that our functions take whole; 0 if none of these is ours.

    Args:
        names: of functions that a mixer calls.
    """
    return max((_DIMENSIONS[name] for name in names if name in _DIMENSIONS), default=0)
