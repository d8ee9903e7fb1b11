"""A stage: runs layers `[start, stop)` of a Hugging Face model on a packed batch of sequences."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from distributed_llm.common.block_indexers import block_sizes
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import encoder_layers
from distributed_llm.common.errors import StageError
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.layer_sharing import lenders_within
from distributed_llm.common.layer_states import keeps_kv
from distributed_llm.common.layer_windows import layer_sections
from distributed_llm.common.messages import MissingPositions, SequenceSlice
from distributed_llm.common.model_sizes import attentions_per_layer
from distributed_llm.common.offloading import away
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.common.workspace import graphs_bytes
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.held import HeldSequences
from distributed_llm.worker.kv.held_transfer import HeldExporter, HeldImporter
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.model.architectures import ensure_supported
from distributed_llm.worker.model.config_faults import computing
from distributed_llm.worker.model.decode_graphs.capture import capture_of
from distributed_llm.worker.model.failures import (
    MissingPositionsError,
    ReleasedSequence,
)
from distributed_llm.worker.model.finite_weights import check_finite_weights
from distributed_llm.worker.model.forward import Forward
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, PageLayer, grouped
from distributed_llm.worker.model.page_choice import in_pages
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.stacks.forward import StackForward
from distributed_llm.worker.model.step_results import StageOutput, StepResults
from distributed_llm.worker.model.task_inputs import Masks, TaskInputs
from distributed_llm.worker.model.tensor_files import Locate
from distributed_llm.worker.model.weights import check_weights, load_stage_model
from distributed_llm.worker.tensor_frames import DTYPE_NAMES

_MAX_RELEASED = 10_000
"""Released sequences that are remembered to recognise late tasks; no task is later than that."""

_WARM_UP = SequenceId(-1)
"""The sequence id of the warm-up; no task can have it."""


class Stage:
    """Consecutive layers of a model, with the KV cache of all sequences in them.

    Use `load` to create one. Only one thread at a time may use it.

    Attributes:
        layers: their numbers in the model.
        inputs: checks the inputs of a step.
    """

    def __init__(
        self,
        stage_model: StageModel,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: KVDtype = "auto",
    ) -> None:
        layers = stage_model.numbers
        self.layers = layers
        self._held = stage_model
        self._last = layers.stop == checkpoint.num_layers
        encoders = encoder_layers(checkpoint.config)
        self.inputs = TaskInputs(
            layers,
            checkpoint.hidden_size,
            checkpoint.vocab_size,
            checkpoint.source_size,
            encoders,
        )
        self._device = device
        self._dtype = dtype
        self._lenders = lenders_within(checkpoint.config, checkpoint.num_layers, layers)
        self._attentions = attentions_per_layer(checkpoint.config)
        self._cache = KVCache(
            len(layers) * self._attentions,
            kv_dtype=kv_dtype,
            in_pages=in_pages(checkpoint.config, device, dtype, kv_dtype),
        )
        own = slice(layers.start, layers.stop)
        self._sections = layer_sections(checkpoint.config, checkpoint.num_layers)[own]
        of_states = checkpoint.layer_state_bytes(DTYPE_NAMES[dtype])[own]
        self._held_sequences = HeldSequences(self._cache, of_states, self._attentions)
        self._coarse_layers: set[int] = set()
        self._page_layers: dict[int, PageLayer] = {}
        self._samplings: dict[SequenceId, Sampling] = {}
        self._released: dict[SequenceId, None] = {}  # the latest last
        self._forward: Forward | StackForward
        if encoders:
            self._forward = StackForward(
                stage_model, checkpoint.num_layers, encoders, device, dtype
            )
        else:
            self._forward = Forward(
                stage_model,
                checkpoint.num_layers,
                device,
                dtype,
                keeps_kv=keeps_kv(checkpoint.config)[own],
                attentions=self._attentions,
                keeps_state=[nbytes > 0 for nbytes in of_states],
                blocks=block_sizes(checkpoint.config),
            )
        self._results = StepResults(
            self._forward, layers, dtype, last=self._last, width=checkpoint.hidden_size
        )
        self._checkpoint = checkpoint
        self._warm_up(of_states)
        capture = capture_of(device)
        if isinstance(self._forward, Forward) and capture is not None:
            self._forward.use_graphs(capture, graphs_bytes(str(device)))

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Quantize = "none",
        kv_dtype: KVDtype = "auto",
        donor: "Stage | None" = None,
        locate: Locate | None = None,
        on_read: Callable[[int], None] = lambda nbytes: None,
        from_disk: int = 0,
        from_ram: int = 0,
    ) -> "Stage":
        """Load a stage, ready to run.

        Args:
            checkpoint: with the weights.
            layers: to load.
            device: to compute on.
            dtype: of weights and computation, and of KV cache if `kv_dtype` is auto.
            quantize: what floating-point matrices of layers become.
            kv_dtype: how keys and values are kept.
            donor: a stage of the same checkpoint, whose modules are shared instead of read again.
                It may run in another thread meanwhile. Afterwards the two may run in turns, and
                either may be dropped.
            locate: returns where a tensor is, once it is there; None: in the checkpoint's folder.
            on_read: called with bytes of tensors when they were read, in any thread.
            from_disk: number of layers whose weights stay on the disk; see `away`.
            from_ram: of those that stay in the machine's memory, beside a GPU.

        Raises:
            NotEnoughMemory: the disk is full, or memory cannot be locked.
            CheckpointUnavailable: a file was cut short meanwhile, or cannot be read just now.
            CheckpointError: the files lack tensors that the layers need, or these are not finite;
                or config.json has a value with which nothing can be computed.
            UnsupportedModel: the architecture gives wrong results when it is split.
            ValueError: the donor has another device or dtype.
        """
        cls.ensure_supported(checkpoint)
        return cls.load_unchecked(
            checkpoint,
            layers,
            device=device,
            dtype=dtype,
            quantize=quantize,
            kv_dtype=kv_dtype,
            donor=donor,
            locate=locate,
            on_read=on_read,
            from_disk=from_disk,
            from_ram=from_ram,
        )

    @classmethod
    def ensure_supported(cls, checkpoint: Checkpoint) -> None:
        """Refuse a model that gives wrong results when it is split; only its config.json is read.

        Raises:
            UnsupportedModel: with the reason and what to do.
        """
        ensure_supported(checkpoint, cls.load_unchecked)

    @classmethod
    def check_loading(cls, checkpoint: Checkpoint) -> None:
        """Refuse a model that could not be loaded, or would be wrong; its weights are not read.

        Raises:
            CheckpointError: tensors are missing, of the wrong shape, or contradict one another.
            UnsupportedModel: the architecture gives wrong results when it is split.
        """
        cls.ensure_supported(checkpoint)
        check_weights(checkpoint)

    @classmethod
    def load_unchecked(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Quantize = "none",
        kv_dtype: KVDtype = "auto",
        donor: "Stage | None" = None,
        locate: Locate | None = None,
        on_read: Callable[[int], None] = lambda nbytes: None,
        from_disk: int = 0,
        from_ram: int = 0,
    ) -> "Stage":
        """Load a stage as `load` does, without checking the architecture."""
        if donor and (donor._device, donor._dtype) != (device, dtype):
            raise ValueError(f"the donor is {donor._dtype} on {donor._device}")
        stage_model = load_stage_model(
            checkpoint,
            layers,
            device=device,
            dtype=dtype,
            quantize=quantize,
            donor=donor._held if donor else None,
            locate=locate,
            on_read=on_read,
            gone=away(layers, from_ram, from_disk),
        )
        return cls(stage_model, checkpoint, device, dtype, kv_dtype)

    @property
    def progress(self) -> Callable[[], None] | None:
        """A function that is called after each layer, in the thread of `run`."""
        return self._forward.hooks.after_layer

    @progress.setter
    def progress(self, listener: Callable[[], None] | None) -> None:
        self._forward.hooks.after_layer = listener

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        return self._held.nbytes

    @property
    def shared_weight_bytes(self) -> int:
        """Bytes of these weights that are shared with the donor."""
        return self._held.shared_nbytes

    @property
    def layers_s(self) -> float:
        """Seconds that the layers took in the latest `run` that completed them.

        Embedding, norm, head and sampling do not count; where all of a step was launched at once,
        layers count by their share of its weights. On a GPU read it after the result was copied to
        the CPU, or it waits for the layers.
        """
        return self._forward.hooks.seconds

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory that the KV cache and states of layers take now."""
        return self._held_sequences.memory_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of memory that one position of one sequence takes in the KV cache, measured."""
        return self._cache.bytes_per_token

    @property
    def kv_windowed_bytes_per_token(self) -> int:
        """Those of them in layers with a window."""
        return self._cache.windowed_bytes_per_token

    @property
    def state_bytes(self) -> int:
        """Bytes that one state of one sequence takes, in all layers that have one of their own."""
        return self._held_sequences.state_bytes

    @property
    def window(self) -> int:
        """Positions that the widest of the layers with a window see; 0 if there are none."""
        return max(self._cache.windows)

    def limit_kv(self, max_bytes: int) -> None:
        """Refuse steps with which KV cache and states would exceed `max_bytes` from now on."""
        self._cache.max_bytes = max_bytes

    def num_computed_tokens(self, sequence_id: SequenceId) -> int:
        """Return how many positions of the sequence are in the KV cache."""
        return self._cache.length(sequence_id)

    def run(
        self,
        sequences: Sequence[SequenceSlice],
        token_ids: Tensor,
        hidden_states: Tensor | None,
        masks: Masks | None = None,
    ) -> StageOutput:
        """Compute one step and add its positions to the KV cache.

        Layers with a state of their own can only go on from where one stands: where the last step
        of the sequence ended or began, at a snapshot, or at the end of a prefix that has one.

        May be repeated with the same arguments, after success as after failure. All errors except
        those of the computation itself are raised before anything changes.

        Args:
            sequences: positions to compute, each sequence once. A sequence that is not held begins
                with its `prefix`; a prefix that is taken is released.
            token_ids: int32 [tokens], at these positions, one sequence after the other.
            hidden_states: [tokens, hidden_size] in any wire dtype, from the stage before; None on
                the first stage.
            masks: uint8 [masked sequences, bytes], of which only the last stage makes use; see
                `Task`.

        Raises:
            ReleasedSequence: a sequence was released before.
            MissingPositionsError: positions before a slice's start are not held, or its sampling
                parameters are unknown.
            KVCacheFull: the step exceeds the limit.
            SequencesFailed: the result is not finite for some sequences, their parameters allow no
                token, or their part of the step does not fit them.
            StageError: the arguments do not fit each other.
        """
        self.inputs.check(sequences, token_ids, hidden_states, masks)
        self._check_released(sequences)
        self._check_positions(sequences)
        self._held_sequences.admit(sequences)
        self._remember(sequences)
        step = self._begin(sequences, token_ids)
        try:
            with torch.inference_mode():
                output = self._results.of(
                    sequences, step, token_ids, hidden_states, masks, self._samplings
                )
            made = (([part.sequence_id for part in each.parts], each.made) for each in step.groups)
            self._held_sequences.commit(sequences, made)
        finally:
            if self.layers.stop <= self.inputs.encoder_layers:  # nothing is kept of sources
                self._held_sequences.free([part.sequence_id for part in sequences])
        return output

    def release(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Free the KV cache of these sequences; later steps must not name them."""
        for sequence_id in sequence_ids:
            self._held_sequences.free([sequence_id])
            self._samplings.pop(sequence_id, None)
            self._released[sequence_id] = None
            if len(self._released) > _MAX_RELEASED:
                del self._released[next(iter(self._released))]

    def forget(self, seen_from: Mapping[SequenceId, int]) -> None:
        """Free what layers with a window will not be asked for any more; see `KVCache.forget`."""
        self._cache.forget(seen_from)

    def reset(self) -> None:
        """Free the KV cache of all sequences, whose ids may then be used again."""
        self._held_sequences.free(self._cache.sequence_ids)
        self._samplings.clear()
        self._released.clear()

    def give_kv_back(self) -> None:
        """Free the memory of the KV cache of a stage that holds no sequence."""
        self._cache.give_back()

    def memory(self) -> list[object]:
        """Return what holds weights and KV cache, so that they can be freed one by one.

        Freeing a gigabyte at once takes as long as several steps.
        """
        return [*self._held.tensors(), *self._held_sequences.tensors]

    def kv_manifest(self, set_back: Collection[SequenceId] = ()) -> KVManifest:
        """Return a description of KV cache and states; not to be called in a step.

        Args:
            set_back: see `HeldExporter.next_chunk`.
        """
        return self._held_sequences.manifest(set_back)

    def export_kv(self, layers: LayerRange) -> HeldExporter:
        """Return an exporter of the KV cache and states of these layers; steps may go on.

        Raises:
            ValueError: the stage does not have these layers.
        """
        return self._held_sequences.exporter(self.layers, layers)

    def import_kv(self, layers: LayerRange, max_bytes: int) -> HeldImporter:
        """Return an importer of KV cache and states of these layers for `assemble_kv`.

        Args:
            layers: some of this stage's.
            max_bytes: of memory for the importer.

        Raises:
            ValueError: the stage does not have these layers.
        """
        return self._held_sequences.importer(self.layers, layers, max_bytes)

    def assemble_kv(self, donor: "Stage | None", imports: Sequence[HeldImporter] = ()) -> None:
        """Fill this stage's empty KV cache from other stages, between two steps of the pipeline.

        Afterwards the stage holds what all sources have in common of each sequence; tasks that
        start beyond that raise `MissingPositionsError`. Sampling parameters, and releases that may
        be late, have to be sent again. Buffers are shared with the donor: either of the two stages
        may run the next step, but the other one must not run after that.

        Args:
            donor: the stage that this worker has run so far.
            imports: for the layers that the donor lacks; must not be used afterwards.

        Raises:
            KVIncomplete: positions have not arrived; nothing was changed.
            KVTransferError: a layer has no source, or states have not arrived; nothing was changed.
            ValueError: this stage holds sequences already.
        """
        if self.layers.stop <= self.inputs.encoder_layers:
            return  # nothing is kept of sources
        own = None
        if donor and donor.layers.stop > self.inputs.encoder_layers:
            own = donor._held_sequences, donor.layers
        self._held_sequences.assemble(self.layers, own, imports)

    def _warm_up(self, of_states: Sequence[int]) -> None:
        """Compute one token and drop it, to learn what the KV cache is like and prepare kernels.

        That happens twice: modules learn from the first time, and layers are recorded the second.

        Args:
            of_states: bytes that the state of a sequence should take in each layer.

        Raises:
            StageError: a layer's state takes others.
            CheckpointError: weights are not finite, or config.json has a value with which nothing
                can be computed.
        """
        encoders = self.inputs.encoder_layers
        one = SequenceSlice(sequence_id=_WARM_UP, start=0, num_tokens=1, source=int(bool(encoders)))
        steps = [one, one]
        if encoders and self.layers.stop > encoders:
            steps.append(msgspec.structs.replace(one, start=1))
        for part in steps:
            source = part.is_source
            token_ids, hidden_states = self.inputs.made_up(1, source=source)
            step = self._begin([part], token_ids)
            rows = [0] if self._last and not source else []
            with computing(self._checkpoint.config):
                result = self._forward.run(step, token_ids, hidden_states, rows)
            if result is not None and not (result.is_meta or result.isfinite().all()):
                self.check_finite_weights()
            self._cache.commit(_WARM_UP, part.start + 1)
        self._cache.free([_WARM_UP])
        self._cache.windows = [step.windows.get(place, 0) for place in range(len(step.appended))]
        (group,) = step.groups
        measured = [sum(tensor.nbytes for tensor in made.values()) for made in group.made]
        self._held_sequences.learn(group.made)
        if measured != list(of_states):
            raise StageError(f"states of layers take {measured} bytes, not {list(of_states)}")

    def check_finite_weights(self) -> None:
        """Raise CheckpointError if weights are not finite; reads all of them."""
        check_finite_weights(self._held, self._checkpoint)

    def _check_released(self, sequences: Sequence[SequenceSlice]) -> None:
        late = [part.sequence_id for part in sequences if part.sequence_id in self._released]
        if late:
            raise ReleasedSequence(f"the task is late: sequences {late} were released")

    def _check_positions(self, sequences: Sequence[SequenceSlice]) -> None:
        missing = tuple(
            MissingPositions(sequence_id=part.sequence_id, have=have)
            for part in sequences
            if (have := self._have(part)) is not None
        )
        if missing:
            raise MissingPositionsError(missing)

    def _have(self, part: SequenceSlice) -> int | None:
        """Return where computing can go on if what is held does not do for the slice; else None."""
        told = part.sampling is not None or part.sequence_id in self._samplings
        if self._last and part.sample and not told:
            return 0  # whoever restarts the sequence sends the parameters again
        return self._held_sequences.have(part)

    def _remember(self, sequences: Sequence[SequenceSlice]) -> None:
        """Remember sampling parameters, and release the prefixes that are taken."""
        for part in sequences:
            if self._last and part.sampling is not None:
                self._samplings[part.sequence_id] = part.sampling
            if part.prefix is not None and part.prefix.take:
                self.release([part.prefix.sequence_id])

    def _begin(self, sequences: Sequence[SequenceSlice], token_ids: Tensor) -> PackedStep:
        tokens = token_ids.cpu().numpy()
        slices, row = [], 0
        for part in sequences:
            stop = row + part.num_tokens
            self._cache.begin(part.sequence_id, part.start, tokens[row:stop])
            slices.append(
                PackedSlice(part.sequence_id, part.start, row, part.num_tokens, part.source)
            )
            row = stop
        begun = [self._held_sequences.state_at(s.sequence_id, s.start) for s in slices]
        num_layers = len(self.layers)
        return PackedStep(
            self._cache,
            self.layers.start * self._attentions,
            tuple(slices),
            [0] * (num_layers * self._attentions),
            self._coarse_layers,
            grouped(slices, begun, num_layers),
            [0] * num_layers,
            [one for one in self._sections for _ in range(self._attentions)],
            [one for one in self._lenders for _ in range(self._attentions)],
            self._page_layers,
        )
