"""Layers with a state of their own (state space, linear attention, convolution), on packed rows.

Their modules, the *mixers*, are transformers' own. They take states from a cache and return new
ones to it. Here each is called once for the single tokens of all sequences, as a batch, and once
for each chunk, with a cache that holds the states of these sequences alone.

Mixers are known by their code: it gives new states to a cache. Most can go on from a state with a
chunk. Those that do not hand their state to the function that computes a chunk would begin anew:
where that is Mamba's scan, ours goes on from it; others are refused.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.errors import StageError, UnsupportedModel
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.states import StateTensors
from distributed_llm.worker.model.convolution import causal_conv1d_fn, causal_conv1d_update
from distributed_llm.worker.model.packed_step import StateGroup, running_step
from distributed_llm.worker.model.recurrent_steps import (
    RECURRENT_STEPS,
    lending,
    lent_dimensions,
)
from distributed_llm.worker.model.selective_scan import (
    going_on_from,
    scan_from_states,
    scan_in_short_pieces,
)

_UPDATES = {"update_conv_state", "update_recurrent_state", "set_linear_cache"}
"""Methods of transformers' caches that take new states."""

_CACHES = ("cache_params", "past_key_values")
"""Parameters by which mixers get their cache."""

_INITIAL = {"initial_state", "initial_states"}
"""Parameters by which functions that compute chunks get a state."""

_CONVOLUTIONS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}
"""What mixers on CPUs call instead of transformers' functions of these names."""

RECURRENCE = "recurrence"
"""Name of the state of a mixer's first recurrence; later ones have their numbers behind it."""

_SCAN = "mamba_selective_scan"
"""What some of those call that do not hand their state on."""

_SCANS = {_SCAN: scan_from_states, "mamba2_chunk_scan": scan_in_short_pieces}
"""Functions that mixers call, each with what makes ours of it."""

_READ_DIRECTLY = ("dt_proj",)
"""Linear layers whose weights mixers multiply by themselves, so that they stay as they are."""


class PlainLinear(nn.Linear):
    """A linear layer that becomes neither integers nor packed: its weight is read by others."""


class StateLayer(nn.Module):
    """A mixer that computes packed sequences.

    Args:
        mixer: of transformers.

    Raises:
        UnsupportedModel: it cannot go on from a state with a chunk.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        forward = _forward_of(mixer)
        parameters = inspect.signature(forward).parameters
        self._cache = next(name for name in _CACHES if name in parameters)
        if not _goes_on_with_chunks(forward.__code__):
            raise UnsupportedModel(
                f"{type(mixer).__name__} begins anew with every chunk of a text, so that "
                "models with it cannot be served. Use another one."
            )
        found = forward.__globals__
        ours = {name: made(found[name]) for name, made in _SCANS.items() if name in found}
        called = [name for name in RECURRENT_STEPS if name in forward.__code__.co_names]
        steps = {name: RECURRENT_STEPS[name](found[name]) for name in called}
        self._lent_dimensions = lent_dimensions(called)
        self._elsewhere = _with_globals(forward, ours)
        self._on_cpu = _with_globals(forward, {**ours, **steps, **_CONVOLUTIONS})

    def forward(self, hidden_states: Tensor, *beside: object, **kwargs: Any) -> Any:
        """Return what the mixer makes of the packed hidden states [1, tokens, hidden_size].

        Args:
            hidden_states: of the step.
            beside: what would be a mask or a state; None each.
            kwargs: for the mixer.

        Raises:
            StageError: the model has a mask of its own.
        """
        if any(one is not None for one in (kwargs.get("attention_mask"), *beside)):
            raise StageError(f"{type(self.mixer).__name__} was given a mask of its own")
        step = running_step()
        layer = int(self.mixer.layer_idx) - step.first_layer  # type: ignore[arg-type]
        step.updated[layer] += 1
        made: list[tuple[Tensor | slice, Tensor]] = []
        others: tuple[Any, ...] | None = None
        for group in step.groups:
            rows = rows_of(group, hidden_states.device)
            taken = hidden_states[0, rows].view(len(group.parts), -1, hidden_states.shape[-1])
            output = self._run(group, layer, taken, kwargs)
            if isinstance(output, tuple):
                output, *rest = output
                others = (None,) * len(rest)
            made.append((rows, output.flatten(0, 1)))
        mixed = assembled(made, hidden_states.shape[1])[None]
        return mixed if others is None else (mixed, *others)

    def _run(self, group: StateGroup, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Any:
        """Compute [sequences, tokens, hidden_size], and keep the new states."""
        given = group.given(layer)
        on_cpu = states.device.type == "cpu"
        compute = self._on_cpu if on_cpu else self._elsewhere
        state = given.get(RECURRENCE) if given else None
        lends = on_cpu and state is not None and state.dim() == self._lent_dimensions
        cache = MixerCache(given, lends=lends)
        told = {**kwargs, self._cache: cache}
        with going_on_from(state), lending(cache.take if lends else None):
            output = compute(self.mixer, hidden_states=states, **told)
        group.made[layer].update(cache.made)
        return output


class MixerCache:
    """What a mixer takes for transformers' cache: states of one layer before and after one call.

    Args:
        given: the states before, not to be written; None: the sequences begin here.
        lends: whether the mixer does not write the state of its first recurrence.

    Attributes:
        made: the states after.
    """

    def __init__(self, given: StateTensors | None, *, lends: bool = False) -> None:
        self._given = given or {}
        self._lends = lends
        self.made: StateTensors = {}

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether the sequences have begun before."""
        return bool(self._given)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether windows grow."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a window, which may be written; None at the beginning."""
        return self._writable(f"window{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a recurrence, which may be written if it is not lent.

        None at the beginning.
        """
        if self._lends and not state_idx:
            return self._given[RECURRENCE]
        return self._writable(RECURRENCE if not state_idx else f"{RECURRENCE}{state_idx}")

    def take(self, state: Tensor) -> None:
        """Take the new state of the first recurrence."""
        self.made[RECURRENCE] = state

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return the state of a recurrence, as MiniMax's attention asks for it."""
        return self.get_recurrent_state(layer_idx)

    def _writable(self, name: str) -> Tensor | None:
        given = self._given.get(name)
        if given is None:
            return None
        self.made[name] = copy = given.clone()
        return copy

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Take columns [sequences, channels, tokens]; return them behind those of the window."""
        name = f"window{state_idx}"
        window = self._given.get(name)
        if window is not None:
            columns = torch.cat([window, conv_states], dim=-1)
            size = window.shape[-1]
        else:
            size = conv_kernel_size or conv_states.shape[-1]
            columns = nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.made[name] = columns[..., -size:].clone(memory_format=torch.contiguous_format)
        return columns

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take the new state of a recurrence."""
        name = RECURRENCE if not state_idx else f"{RECURRENCE}{state_idx}"
        self.made[name] = recurrent_states.contiguous()
        return recurrent_states

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Take the new state of a recurrence, as MiniMax's attention gives it."""
        self.update_recurrent_state(linear_cache, layer_idx)


def keep_plain(layer: nn.Module) -> None:
    """Have linear layers stay as they are whose weights mixers read; before weights are loaded."""
    for mixer in _mixers(layer):
        for name in _READ_DIRECTLY:
            linear = getattr(mixer, name, None)
            if type(linear) is nn.Linear:
                linear.__class__ = PlainLinear


def wrap_mixers(model: nn.Module) -> None:
    """Have the mixers of `model` compute packed sequences; after weights were loaded."""
    found = {id(mixer) for mixer in _mixers(model)}
    for name, module in list(model.named_modules()):
        if id(module) in found:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, StateLayer(module))


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if not isinstance(forward, FunctionType):
            continue
        code = forward.__code__
        if _UPDATES.intersection(code.co_names) and "hidden_states" in code.co_varnames:
            yield module


def _forward_of(mixer: nn.Module) -> FunctionType:
    forward = inspect.unwrap(type(mixer).forward)
    assert isinstance(forward, FunctionType)
    return forward


def _with_globals(forward: FunctionType, ours: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a copy of a function that finds ours where it looks for transformers' functions."""
    found = {**forward.__globals__, **ours}
    copy = FunctionType(forward.__code__, found, closure=forward.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return copy


def _goes_on_with_chunks(code: CodeType) -> bool:
    """Return whether a mixer gives the state of its recurrence to what computes chunks."""
    if "set_linear_cache" in code.co_names or "update_recurrent_state" not in code.co_names:
        return True
    names = (name for const in code.co_consts if isinstance(const, tuple) for name in const)
    return _SCAN in code.co_names or not _INITIAL.isdisjoint(names)


def rows_of(group: StateGroup, device: torch.device) -> Tensor | slice:
    """Return where the tokens of a group are in the packed row."""
    first, last = group.parts[0], group.parts[-1]
    stop = last.row + last.num_tokens
    if len(group.parts) == 1 or stop - first.row == len(group.parts):
        return slice(first.row, stop)
    return sent(torch.tensor([part.row for part in group.parts]), device)


def assembled(made: list[tuple[Tensor | slice, Tensor]], tokens: int) -> Tensor:
    """Return [tokens, hidden_size] of what was made of some rows each."""
    if len(made) == 1:
        return made[0][1]
    mixed = made[0][1].new_empty((tokens, made[0][1].shape[-1]))
    for rows, output in made:
        mixed[rows] = output
    return mixed
