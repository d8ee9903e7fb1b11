"""Layers that embed n-grams of tokens, on packed rows.

Their modules are transformers' own. Each is called once for the single tokens of all sequences, and
once for each chunk, like mixers (`state_layers`). The tokens before those of a step are taken from
the KV cache, which holds the tokens of every sequence on every stage.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distributed_llm.common.ngrams import follows_from_config
from distributed_llm.worker.devices import sent
from distributed_llm.worker.kv.states import StateTensors
from distributed_llm.worker.model.convolution import DilatedConvolution
from distributed_llm.worker.model.packed_step import PackedStep, StateGroup, running_step
from distributed_llm.worker.model.state_layers import MixerCache, assembled, rows_of

_PART = "ple"
"""What layers call the part that embeds n-grams."""

_TOKENS = 2
"""Under which number the part asks for the tokens before, as for a window."""


class NgramLayer(nn.Module):
    """The part of a layer that embeds n-grams, which computes packed sequences.

    Args:
        part: of transformers.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part: Any = part

    def forward(self, hidden_states: Tensor, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        """Return what is to be added to the residual.

        Args:
            hidden_states: [1, tokens, streams * hidden_size].
            input_ids: int64 [1, tokens].
        """
        step = running_step()
        layer = int(self.part.layer_idx) - step.first_layer
        made: list[tuple[Tensor | slice, Tensor]] = []
        for group in step.groups:
            rows = rows_of(group, hidden_states.device)
            count = len(group.parts)
            states = hidden_states[0, rows].view(count, -1, hidden_states.shape[-1])
            token_ids = input_ids[0, rows].view(count, -1)
            cache = _NgramCache(group.given(layer), self._tokens_before(step, group))
            output = self.part(states, token_ids, cache)
            group.made[layer].update(cache.made)
            made.append((rows, output.flatten(0, 1)))
        return assembled(made, hidden_states.shape[1])[None]

    def _tokens_before(self, step: PackedStep, group: StateGroup) -> Tensor:
        """Return the tokens before those of each sequence, int64 [sequences, tokens].

        Where there are none, the end of a text stands.
        """
        embedding = self.part.ple_embedding
        length = int(embedding.context_len)
        found = torch.full((len(group.parts), length), int(embedding.eos_token_id))
        for row, part in zip(found, group.parts, strict=True):
            before = step.cache.tokens(part.sequence_id, part.start)[-length:]
            row[length - len(before) :] = torch.from_numpy(before)
        return sent(found, embedding.ngram_embedding.weight.device)


class _NgramCache(MixerCache):
    """The cache of a mixer, and the tokens before the step's.

    Args:
        given: the states before, not to be written; None: the sequences begin here.
        tokens: int64 [sequences, tokens].
    """

    def __init__(self, given: StateTensors | None, tokens: Tensor) -> None:
        super().__init__(given)
        self._tokens = tokens

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a window, or the tokens."""
        if state_idx == _TOKENS:
            return self._tokens
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Take columns; tokens are kept elsewhere."""
        if state_idx == _TOKENS:
            return conv_states
        return super().update_conv_state(conv_states, layer_idx, state_idx, conv_kernel_size)


def wrap_ngram_parts(layer: nn.Module) -> None:
    """Have the part of a loaded layer that embeds n-grams compute packed sequences, if any."""
    part = getattr(layer, _PART, None)
    if isinstance(part, nn.Module):
        part.conv1d = DilatedConvolution(part.get_submodule("conv1d"))
        setattr(layer, _PART, NgramLayer(part))


def derive_from_config(model: nn.Module) -> None:
    """Have a model, on the meta device, compute what follows from its configuration.

    Otherwise its weights would have to come with it.
    """
    for name, buffer in list(model.named_buffers()):
        if follows_from_config(name):
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent).register_buffer(own, buffer, persistent=False)
