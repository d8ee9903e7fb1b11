"""Runs the layers of a stage on the packed batch of one step: one forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distributed_llm.common.block_indexers import BLOCK_INDEXED, BlockSizes
from distributed_llm.common.errors import StageError
from distributed_llm.common.indexers import INDEXED
from distributed_llm.common.key_blocks import CHOOSES_BLOCKS
from distributed_llm.worker.devices import sent
from distributed_llm.worker.model.away_layers import place_of
from distributed_llm.worker.model.block_indexers import block_starts
from distributed_llm.worker.model.decode_graphs.capture import Capture
from distributed_llm.worker.model.decode_graphs.packed_steps import GraphedSteps
from distributed_llm.worker.model.decode_graphs.steps import DecodeGraphs
from distributed_llm.worker.model.hidden_sums import HiddenSums, Spans
from distributed_llm.worker.model.kernels import kernels_for
from distributed_llm.worker.model.layer_hooks import LayerHooks, event_type
from distributed_llm.worker.model.own_attention import OWN_ATTENTION
from distributed_llm.worker.model.packed_step import PackedStep, running
from distributed_llm.worker.model.recorded_layers import Kept, record_layers
from distributed_llm.worker.model.shared_weights import StageModel


class Forward:
    """The forward pass of one stage.

    Args:
        stage_model: with the layers; the hooks on them belong to this object.
        num_layers: of the whole model.
        device: to compute on.
        dtype: to compute in.
        keeps_kv: whether each of the layers appends keys and values in every step.
        attentions: how many times it does so.
        keeps_state: whether each of them makes a new state of its own.
        blocks: sizes of the blocks of positions that attention chooses, if it does.

    Attributes:
        hooks: on the layers, for progress after each and the time that they took.
        sums: of the last hidden states, on the last stage.
    """

    def __init__(
        self,
        stage_model: StageModel,
        num_layers: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        keeps_kv: Sequence[bool],
        attentions: int,
        keeps_state: Sequence[bool],
        blocks: BlockSizes | None,
    ) -> None:
        self._model = stage_model.model
        self._decoder = stage_model.decoder
        self._device = device
        self._dtype = dtype
        config = stage_model.model.config
        self._streams = getattr(config, "altup_num_inputs", getattr(config, "hc_mult", 1))
        self._streams_first = hasattr(config, "altup_num_inputs")
        self._blocks = blocks
        self._appending = [int(keeps) for keeps in keeps_kv for _ in range(attentions)]
        self._updating = [int(keeps) for keeps in keeps_state]
        self._layers = stage_model.layers
        self._is_last = stage_model.numbers.stop == num_layers
        self._graphed: GraphedSteps | None = None
        self.sums = HiddenSums(stage_model.decoder)
        self.hooks = LayerHooks(
            stage_model.layers,
            first=stage_model.numbers.start == 0,
            last=self._is_last,
            new_event=event_type(device),
            after_layer=None,
        )
        record_layers(
            stage_model.layers,
            [
                Kept(kv, state) if attentions == 1 and self._calls_attention_plainly() else None
                for kv, state in zip(keeps_kv, keeps_state, strict=True)
            ],
            *(device, dtype),
        )

    def use_graphs(self, capture: Capture, room_bytes: int) -> None:
        """Have decode steps become graphs from now on, unless layers forbid it.

        Args:
            capture: makes graphs.
            room_bytes: of the device's memory that they may take.
        """
        is_away = any(place_of(layer) is not None for layer in self._layers)
        if is_away or any(self._updating) or self._blocks is not None:
            return
        graphs = DecodeGraphs(capture, self._device, room_bytes)
        model: Any = self._model
        head = model.get_output_embeddings() if self._is_last else None
        self._graphed = GraphedSteps(graphs, self.hooks, self._layers, head)

    def _calls_attention_plainly(self) -> bool:
        """Return whether a layer's attention depends on what it is given and its own cache alone.

        Not if it is in code of its own, gives keys and values to other layers, or chooses some.
        """
        config = self._model.config
        shares = getattr(config, "num_kv_shared_layers", 0) or self._streams > 1
        of_code = OWN_ATTENTION | INDEXED | BLOCK_INDEXED | CHOOSES_BLOCKS
        return not shares and config.model_type not in of_code

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
            step: to compute.
            token_ids: int32 [tokens].
            hidden_states: [tokens, hidden_size] from the previous stage; None on the first stage.
            rows: of the packed batch to return logits for, [len(rows), vocab_size]; empty on all
                stages but the last. On the last stage None is returned if it is empty.
            spans: rows [start, stop) of the packed batch over which the last stage sums up the
                model's last hidden states, to be taken from `sums`.

        Raises:
            StageError: a layer did not call each attention exactly once, or did not make exactly
                one new state if it keeps any.
        """
        given = self._given(step, token_ids, hidden_states, rows)

        def plainly() -> Tensor | None:
            return self._plainly(step, given, spans)

        every_row = len(rows) == (len(token_ids) if self._is_last else 0)
        if self._graphed is None or step.chunks or spans or not every_row:
            return plainly()
        if hidden_states is not None:
            given["hidden_states"] = hidden_states.to(self._dtype)
        return self._graphed.run(step, given, self._compute, plainly)

    def _given(
        self, step: PackedStep, token_ids: Tensor, hidden_states: Tensor | None, rows: list[int]
    ) -> dict[str, Tensor]:
        """Return what a step is computed from, on the CPU; see `_compute`."""
        positions = [torch.arange(s.start, s.start + s.num_tokens) for s in step.slices]
        if self._blocks is not None:  # to turn their keys, as `PackedBlockIndexer` expects it
            starts = block_starts(step.slices, self._blocks)
            positions.insert(0, torch.tensor(starts, dtype=torch.int64))
        given = {"token_ids": token_ids.to(torch.int64), "positions": torch.cat(positions)}
        if hidden_states is not None:
            given["hidden_states"] = hidden_states
        if rows:
            given["rows"] = torch.tensor(rows)
        return given

    def _plainly(
        self, step: PackedStep, given: Mapping[str, Tensor], spans: Spans
    ) -> Tensor | None:
        """Compute a step kernel by kernel."""
        self.sums.spans = spans
        try:
            return self._compute(step, {n: sent(one, self._device) for n, one in given.items()})
        finally:
            self.sums.spans = ()

    def _compute(self, step: PackedStep, given: Mapping[str, Tensor]) -> Tensor | None:
        """Compute a step from tensors on the device.

        Args:
            step: to compute.
            given: `token_ids` and `positions`, int64 [tokens], the latter behind those of blocks;
                `hidden_states` but on the first stage, as `run` takes them; `rows`, int64, but
                where no logits are wanted.
        """
        inputs = {
            "input_ids": given["token_ids"][None],
            "position_ids": given["positions"][None],
            "use_cache": False,
        }
        if "hidden_states" in given:
            self.hooks.incoming = self._in_streams(given["hidden_states"].to(self._dtype))
        output: Tensor | None
        try:
            with running(step), kernels_for(len(given["token_ids"])):
                if "rows" in given:
                    output = self._model(**inputs, logits_to_keep=given["rows"]).logits
                else:
                    self._decoder(**inputs)
                    output = self.hooks.outgoing
        finally:
            self.hooks.forget()
        self._check_every_layer_ran(step)
        if output is None:
            return None
        return output[0] if "rows" in given else self._side_by_side(output)

    def _in_streams(self, states: Tensor) -> Tensor:
        """Return hidden states as layers take them.

        [1, tokens, hidden_size]; of several, [streams, 1, ...] or [1, tokens, streams, ...].
        """
        if self._streams == 1:
            return states[None]
        streams = states.view(len(states), self._streams, -1)
        return streams.transpose(0, 1)[:, None] if self._streams_first else streams[None]

    def _side_by_side(self, states: Tensor) -> Tensor:
        """Return what layers gave as [tokens, all hidden states of each]."""
        if states.dim() == 3:
            return states[0]
        streams = states[:, 0].transpose(0, 1) if self._streams_first else states[0]
        return streams.flatten(1)

    def _check_every_layer_ran(self, step: PackedStep) -> None:
        if step.appended != self._appending:
            raise StageError(
                f"the layers called their attention {step.appended} times; {self._appending} is "
                "right"
            )
        if step.updated != self._updating:
            raise StageError(
                f"the layers made {step.updated} new states of their own; {self._updating} is right"
            )
