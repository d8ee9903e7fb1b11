"""Layers with a state of their own (state space, linear attention, convolution), on packed rows.

Their modules, the *mixers*, are transformers' own. They take states from a cache and return new
ones to it. Here each is called once for the single tokens of all sequences, as a batch, and once
for each chunk, with a cache that holds the states of these sequences alone.

Mixers are known by their code: it gives new states to a cache. Most can go on from a state with a
chunk. Those that do not hand their state to the function that computes a chunk would begin anew;
they are given the tokens of such a chunk one after the other.
"""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.errors import StageError
from distributed_llm.worker.kv.states import StateTensors
from distributed_llm.worker.model.packed_step import StateGroup, running_step

_UPDATES = {"update_conv_state", "update_recurrent_state", "set_linear_cache"}
"""Methods of transformers' caches that take new states."""

_CACHES = ("cache_params", "past_key_values")
"""Parameters by which mixers get their cache."""

_INITIAL = {"initial_state", "initial_states"}
"""Parameters by which functions that compute chunks get a state."""

_READ_DIRECTLY = ("dt_proj",)
"""Linear layers whose weights mixers multiply by themselves, so that they stay as they are."""


class PlainLinear(nn.Linear):
    """A linear layer that becomes neither integers nor packed: its weight is read by others."""


class StateLayer(nn.Module):
    """A mixer that computes packed sequences.

    Args:
        mixer: of transformers.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        code = _code_of(mixer)
        parameters = inspect.signature(inspect.unwrap(type(mixer).forward)).parameters
        self._cache = next(name for name in _CACHES if name in parameters)
        self._takes_chunks = _goes_on_with_chunks(code)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Return what the mixer makes of the packed hidden states [1, tokens, hidden_size].

        Raises:
            StageError: the model has a mask of its own.
        """
        if kwargs.get("attention_mask") is not None:
            raise StageError(f"{type(self.mixer).__name__} was given a mask of its own")
        step = running_step()
        layer = int(self.mixer.layer_idx) - step.first_layer  # type: ignore[arg-type]
        step.updated[layer] += 1
        made: list[tuple[Tensor | slice, Tensor]] = []
        others: tuple[Any, ...] | None = None
        for group in step.groups:
            rows = _rows_of(group, hidden_states.device)
            taken = hidden_states[0, rows].view(len(group.parts), -1, hidden_states.shape[-1])
            output = self._run(group, layer, taken, kwargs)
            if isinstance(output, tuple):
                output, *rest = output
                others = (None,) * len(rest)
            made.append((rows, output.flatten(0, 1)))
        mixed = _assembled(made, hidden_states.shape[1])[None]
        return mixed if others is None else (mixed, *others)

    def _run(self, group: StateGroup, layer: int, states: Tensor, kwargs: dict[str, Any]) -> Any:
        """Compute [sequences, tokens, hidden_size], and keep the new states."""
        given = group.given(layer)
        pieces = [states]
        if given is not None and not self._takes_chunks:
            pieces = list(torch.split(states, 1, dim=1))
        outputs = []
        for piece in pieces:
            cache = MixerCache(given)
            outputs.append(self.mixer(hidden_states=piece, **{**kwargs, self._cache: cache}))
            given = cache.made
        group.made[layer] = given or {}
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class MixerCache:
    """What a mixer takes for transformers' cache: states of one layer before and after one call.

    Args:
        given: the states before, not to be written; None: the sequences begin here.

    Attributes:
        made: the states after.
    """

    def __init__(self, given: StateTensors | None) -> None:
        self._given = given or {}
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
        """Return the state of a recurrence, which may be written; None at the beginning."""
        return self._writable(f"recurrence{state_idx}")

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
        self.made[name] = columns[..., -size:].clone()
        return columns

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take the new state of a recurrence."""
        self.made[f"recurrence{state_idx}"] = recurrent_states
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
        if not isinstance(module, StateLayer) and _UPDATES.intersection(_code_of(module).co_names):
            yield module


def _code_of(module: nn.Module) -> CodeType:
    forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
    return forward.__code__


def _goes_on_with_chunks(code: CodeType) -> bool:
    """Return whether a mixer gives the state of its recurrence to what computes chunks."""
    if "set_linear_cache" in code.co_names or "update_recurrent_state" not in code.co_names:
        return True
    names = (name for const in code.co_consts if isinstance(const, tuple) for name in const)
    return not _INITIAL.isdisjoint(names)


def _rows_of(group: StateGroup, device: torch.device) -> Tensor | slice:
    """Return where the tokens of a group are in the packed row."""
    first, last = group.parts[0], group.parts[-1]
    stop = last.row + last.num_tokens
    if len(group.parts) == 1 or stop - first.row == len(group.parts):
        return slice(first.row, stop)
    return torch.tensor([part.row for part in group.parts], device=device)


def _assembled(made: list[tuple[Tensor | slice, Tensor]], tokens: int) -> Tensor:
    """Return [tokens, hidden_size] of what was made of some rows each."""
    if len(made) == 1:
        return made[0][1]
    mixed = made[0][1].new_empty((tokens, made[0][1].shape[-1]))
    for rows, output in made:
        mixed[rows] = output
    return mixed
