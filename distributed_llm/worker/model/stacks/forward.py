"""Runs the layers of a stage of an encoder-decoder on a packed batch: of sources, or of answers.

A *source step* passes sources through encoder layers, and has each decoder layer make of their
result, which all stages pass on, the keys and values that answers look across at. A *target step*
passes tokens of answers through decoder layers, from the stage on that has the first of them.
"""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from distributed_llm.common.errors import StageError
from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.away_layers import turn_of
from distributed_llm.worker.model.hidden_sums import HiddenSums, Spans
from distributed_llm.worker.model.kernels import kernels_for
from distributed_llm.worker.model.layer_hooks import LayerHooks, event_type
from distributed_llm.worker.model.packed_step import PackedStep, running
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.stacks.joined import stack_of
from distributed_llm.worker.model.stacks.modules import projected_source
from distributed_llm.worker.model.stacks.positions import positions_of


@dataclass
class _EncoderOutput(BaseModelOutput):
    """What the encoder would give that is not asked.

    Attributes:
        router_logits: that models with experts pass on.
    """

    router_logits: None = None


_MASKS = ("full_attention", "sliding_attention")
"""Of a decoder that joins masks, of which none is used here."""

_LOOKING_ACROSS = ("across", "merged")


class StackForward:
    """The forward pass of one stage of an encoder-decoder.

    Args:
        stage_model: with the layers; the hooks on them belong to this object.
        num_layers: of the whole model.
        num_encoder_layers: likewise, of the encoder.
        device: to compute on.
        dtype: to compute in.

    Attributes:
        hooks: on the layers, as those of `Forward`.
        sums: of hidden states, of which there are none.
    """

    def __init__(
        self,
        stage_model: StageModel,
        num_layers: int,
        num_encoder_layers: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        own = stage_model.numbers
        encoders = max(0, min(num_encoder_layers, own.stop) - own.start)
        self._model: Any = stage_model.model
        self._encoder: Any = stack_of(stage_model.model, "encoder")
        self._decoder: Any = stack_of(stage_model.model, "decoder")
        self._num_encoders = encoders
        self._decoding = stage_model.layers[encoders:]
        self._across = [_attention_across(layer) for layer in self._decoding]
        self._is_last = own.stop == num_layers
        self._device = device
        self._dtype = dtype
        self._rows: Tensor | None = None
        self.sums = HiddenSums(nn.Identity())
        self.hooks = LayerHooks(
            stage_model.layers,
            first=own.start in (0, num_encoder_layers),
            last=self._is_last,
            new_event=event_type(device),
            after_layer=None,
            entries=self._decoding[:1] if encoders else (),
        )
        self._takes_positions = (
            "position_ids" in inspect.signature(self._decoder.forward).parameters
        )
        merges = any(module.attends == "merged" for module in self._across)
        self._no_masks = dict.fromkeys(_MASKS, torch.empty(0)) if merges else None
        if self._is_last:
            self._decoder.register_forward_hook(self._keep_rows)

    @torch.inference_mode()
    def run(
        self,
        step: PackedStep,
        token_ids: Tensor,
        hidden_states: Tensor | None,
        rows: list[int],
        spans: Spans = (),
    ) -> Tensor | None:
        """Return hidden states [tokens, hidden_size], or logits on the last stage.

        Appends the keys and values of the step to the KV cache.

        Args:
            step: to compute: all of it sources, or all of it answers.
            token_ids: int32 [tokens].
            hidden_states: [tokens, hidden_size] from the previous stage; None where the step
                begins.
            rows: of the packed batch to return logits for; see `Forward.run`.
            spans: are ignored: nothing is summed up.

        Raises:
            StageError: a layer did not append what it should.
        """
        ids = sent(token_ids.to(torch.int64), self._device)[None]
        if hidden_states is not None:
            self.hooks.incoming = sent(hidden_states, self._device).to(self._dtype)[None]
        compute = self._read_sources if step.slices[0].is_source else self._write_answers
        try:
            with running(step), kernels_for(len(token_ids)):
                output = compute(step, ids, rows)
        finally:
            self.hooks.forget()
            self._rows = None
        wanted = [0] * self._num_encoders + [1] * len(self._decoding)
        if step.appended != wanted:
            raise StageError(f"the layers appended {step.appended} times; {wanted} is right")
        return None if output is None else output.to(self._dtype)  # T5's float16 grows to float32

    def _read_sources(self, step: PackedStep, ids: Tensor, rows: list[int]) -> Tensor | None:
        """Compute a source step; return what the encoder has made so far."""
        states = self.hooks.incoming
        if self._num_encoders:
            states = self._encoder(input_ids=ids, **self._positions(step)).last_hidden_state
        else:
            self.hooks.begin()
        assert states is not None
        for layer, across in enumerate(self._across, self._num_encoders):
            with turn_of(self._decoding[layer - self._num_encoders]):
                keys, values = projected_source(across, states)
            for part in step.slices:
                own = slice(part.row, part.row + part.num_tokens)
                step.cache.append(layer, part.sequence_id, part.start, keys[:, own], values[:, own])
            step.appended[layer] += 1
            self.hooks.report_progress()
        self.hooks.end()
        return None if self._is_last else states[0]

    def _write_answers(self, step: PackedStep, ids: Tensor, rows: list[int]) -> Tensor | None:
        """Compute a target step; return hidden states, or logits of `rows` on the last stage."""
        nothing = torch.empty((1, 0, 1), dtype=self._dtype, device=self._device)
        if rows:
            self._rows = sent(torch.tensor(rows), self._device)
            inputs = {f"decoder_{name}": given for name, given in self._positions(step).items()}
            made = self._model(
                encoder_outputs=_EncoderOutput(last_hidden_state=nothing),
                decoder_input_ids=ids,
                use_cache=False,
                attention_mask=self._no_masks,
                decoder_attention_mask=self._no_masks,
                **inputs,
            )
            return cast(Tensor, made.logits[0])
        self._decoder(
            input_ids=ids,
            attention_mask=self._no_masks,
            encoder_attention_mask=self._no_masks,
            encoder_hidden_states=nothing,
            use_cache=False,
            **self._positions(step),
        )
        return None if self._is_last else cast(Tensor, self.hooks.outgoing)[0]

    def _positions(self, step: PackedStep) -> dict[str, Tensor]:
        """Return the positions as stacks take them that embed none; others ask by themselves."""
        if not self._takes_positions:
            return {}
        return {"position_ids": sent(positions_of(step), self._device)[None]}

    def _keep_rows(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Give the head no other rows than those that are asked for."""
        if self._rows is not None:
            output.last_hidden_state = output.last_hidden_state[:, self._rows]
        return output


def _attention_across(layer: nn.Module) -> nn.Module:
    """Return the attention of a decoder layer that looks across."""
    return next(m for m in layer.modules() if getattr(m, "attends", "") in _LOOKING_ACROSS)
