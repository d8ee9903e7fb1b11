"""Runs layers `[start, stop)` of a Hugging Face model on a packed batch of sequences."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import MissingPositions, SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.kv.assembly import assemble
from distributed_llm.worker.kv.cache import KVCache
from distributed_llm.worker.kv.manifest import KVManifest
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter
from distributed_llm.worker.model.architectures import ensure_supported
from distributed_llm.worker.model.attention import PackedSlice, PackedStep, running
from distributed_llm.worker.model.kernels import kernels_for
from distributed_llm.worker.model.layer_hooks import LayerHooks, event_type
from distributed_llm.worker.model.sampler import log_probabilities, sample
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.task_inputs import TaskInputs
from distributed_llm.worker.model.weights import load_stage_model

_MAX_RELEASED = 10_000
"""How many released sequences are remembered; a task is never this late."""

_WARM_UP = -1
"""A sequence id that no task can have."""


@dataclass(frozen=True)
class StageOutput:
    """What one step of a stage gives.

    Attributes:
        hidden_states: [tokens, hidden_size] in the stage's dtype, on its device; None on the last.
        token_ids: int32 [sequences that sample] on the CPU, in the order of the task; None on all
            stages but the last.
        logprobs: float32 [sequences that sample, 1 + k] on the CPU: natural logarithms of what the
            model's own logits, before any parameter, give the token that was picked and the k
            likeliest, best first. k is the most that any of these sequences asked for; all rows
            are full. None if none asked.
        logprob_ids: int32, of the same shape: whose they are.
    """

    hidden_states: Tensor | None = None
    token_ids: Tensor | None = None
    logprobs: Tensor | None = None
    logprob_ids: Tensor | None = None


class MissingPositionsError(StageError):
    """Sequences were to go on at positions whose predecessors are not held. Nothing was touched.

    Args:
        missing: what is held of each of them.
    """

    def __init__(self, missing: tuple[MissingPositions, ...]) -> None:
        held = ", ".join(f"{m.have} of sequence {m.sequence_id}" for m in missing)
        super().__init__(f"positions are missing in the KV cache; held are {held}")
        self.missing = missing


class ReleasedSequence(StageError):
    """A task names a sequence that was released: it is late, and void. Nothing was touched."""


class Stage:
    """Consecutive layers of a model and the KV cache of all sequences in them.

    Not to be used from two threads at once. Make it with `load`.

    Attributes:
        layers: which of the model's layers these are.
        inputs: what it can be given.
    """

    def __init__(
        self,
        stage_model: StageModel,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layers = stage_model.numbers
        self.layers = layers
        self._held = stage_model
        self._model = stage_model.model
        self._decoder = stage_model.decoder
        self._first = layers.start == 0
        self._last = layers.stop == checkpoint.num_layers
        self.inputs = TaskInputs(layers, checkpoint.hidden_size, checkpoint.vocab_size)
        self._device = device
        self._dtype = dtype
        self._cache = KVCache(len(layers))
        self._samplings: dict[int, Sampling] = {}
        self._released: dict[int, None] = {}  # the latest last
        self._hooks = LayerHooks(
            stage_model.layers,
            first=self._first,
            last=self._last,
            new_event=event_type(device),
            after_layer=None,
        )
        self._warm_up()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        device: torch.device,
        dtype: torch.dtype,
        donor: "Stage | None" = None,
    ) -> "Stage":
        """Return the stage with its weights read, ready to run.

        Args:
            donor: a stage of the same weights. Its layers and whatever else it holds are shared
                with it, not read again. It goes on as before, also in another thread meanwhile;
                the two may run in turns, and either may be dropped.

        Raises:
            CheckpointError: the files do not hold what the layers need.
            UnsupportedModel: the architecture is computed wrongly when it is split.
            ValueError: the donor is on another device or of another dtype.
        """
        cls.ensure_supported(checkpoint)
        return cls.load_unchecked(checkpoint, layers, device=device, dtype=dtype, donor=donor)

    @classmethod
    def ensure_supported(cls, checkpoint: Checkpoint) -> None:
        """Refuse a model that is computed wrongly when it is split; reads only its configuration.

        Raises:
            UnsupportedModel: with what, why and what to do.
        """
        ensure_supported(checkpoint, cls.load_unchecked)

    @classmethod
    def load_unchecked(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        device: torch.device,
        dtype: torch.dtype,
        donor: "Stage | None" = None,
    ) -> "Stage":
        """Return what `load` returns, for an architecture that may be computed wrongly."""
        if donor and (donor._device, donor._dtype) != (device, dtype):
            raise ValueError(f"the donor is {donor._dtype} on {donor._device}")
        stage_model = load_stage_model(
            checkpoint,
            layers,
            device=device,
            dtype=dtype,
            donor=donor._held if donor else None,
        )
        return cls(stage_model, checkpoint, device, dtype)

    @property
    def progress(self) -> Callable[[], None] | None:
        """What is called after each layer, in the thread of `run`; feeds the heartbeat."""
        return self._hooks.after_layer

    @progress.setter
    def progress(self, listener: Callable[[], None] | None) -> None:
        self._hooks.after_layer = listener

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        return self._held.nbytes

    @property
    def shared_weight_bytes(self) -> int:
        """How many of them the donor held when this was loaded; the others were added."""
        return self._held.shared_nbytes

    @property
    def layers_s(self) -> float:
        """Seconds that the layers took in the latest `run` that came through them.

        What comes before and after them (embedding, norm, head, sampling) is left out. On a GPU
        read it after the result was copied to the CPU; else it waits for the layers.
        """
        return self._hooks.seconds

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory that the KV cache takes now."""
        return self._cache.nbytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of memory that one position of one sequence takes in the KV cache, measured."""
        return self._cache.bytes_per_token

    def limit_kv(self, max_bytes: int) -> None:
        """Refuse steps that would make the KV cache take more than this."""
        self._cache.max_bytes = max_bytes

    def num_computed_tokens(self, sequence_id: int) -> int:
        """Return how many positions of the sequence are in the KV cache."""
        return self._cache.length(sequence_id)

    def run(
        self,
        sequences: Sequence[SequenceSlice],
        token_ids: Tensor,
        hidden_states: Tensor | None,
    ) -> StageOutput:
        """Compute one step and add its positions to the KV cache.

        May be called again with the same arguments, whether it succeeded or failed before. All
        errors but those of computing itself come before anything is touched.

        Args:
            sequences: which positions of which sequences; each sequence once. One that is not
                held begins as its `prefix`; a sequence that is taken is released.
            token_ids: int32 [tokens], the tokens at those positions, one sequence after the other.
            hidden_states: [tokens, hidden_size] in any wire dtype, what the stage before gave;
                None on the first stage.

        Raises:
            ReleasedSequence: a sequence was released before.
            MissingPositionsError: positions before a slice's start are not held, or it samples and
                how was never told.
            KVCacheFull: it does not fit the limit.
            StageError: the arguments do not fit each other, or the result is not finite.
        """
        self.inputs.check(sequences, token_ids, hidden_states)
        self._check_released(sequences)
        self._check_positions(sequences)
        self._cache.admit(sequences)
        self._note(sequences)
        step = self._begin(sequences, token_ids)
        with torch.inference_mode(), running(step), kernels_for(len(token_ids)):
            output = self._compute(sequences, step, token_ids, hidden_states)
        for part in step.slices:
            self._cache.commit(part.sequence_id, part.start + part.num_tokens)
        return output

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Free the KV cache of these sequences; they never come back, known here or not."""
        for sequence_id in sequence_ids:
            self._cache.free([sequence_id])
            self._samplings.pop(sequence_id, None)
            self._released[sequence_id] = None
            if len(self._released) > _MAX_RELEASED:
                del self._released[next(iter(self._released))]

    def reset(self) -> None:
        """Free the KV cache of all sequences and forget that any existed: ids may begin anew."""
        self._cache.free(self._cache.sequence_ids)
        self._samplings.clear()
        self._released.clear()

    def memory(self) -> list[Tensor]:
        """Return all weights and all of the KV cache, to be let go of little by little.

        To give a gigabyte back at once takes as long as several steps.
        """
        return [*self._held.tensors(), *self._cache.buffers()]

    def kv_manifest(self) -> KVManifest:
        """Tell what the KV cache holds; no step runs meanwhile."""
        return self._cache.manifest()

    def export_kv(self, layers: LayerRange) -> KVExporter:
        """Return what hands out the KV cache of these layers, while this stage goes on.

        Raises:
            ValueError: the stage does not have these layers.
        """
        return KVExporter(self._cache, self.layers, layers)

    def import_kv(self, layers: LayerRange, max_bytes: int) -> KVImporter:
        """Return what collects the KV cache of these layers for `assemble_kv`.

        Args:
            layers: some of this stage's.
            max_bytes: of memory that it may take.

        Raises:
            ValueError: the stage does not have these layers.
        """
        start = self.layers.start
        if layers.start < start or layers.stop > self.layers.stop:
            raise ValueError(f"a stage of layers {self.layers} has no layers {layers}")
        numbers = range(layers.start, layers.stop)
        return KVImporter({n: self._cache.layout(n - start) for n in numbers}, max_bytes)

    def assemble_kv(self, donor: "Stage | None", imports: Sequence[KVImporter] = ()) -> None:
        """Go on with the sequences of other stages, between two steps of the pipeline.

        What all sources hold of a sequence is held afterwards; a task that starts beyond that is
        answered with what is missing. How to sample is to be told again, and releases too that may
        be late. What the donor holds is referenced, not copied: until either runs, one may be
        dropped for the other; once one has run, the other must not run any more.

        Args:
            donor: what this worker ran so far.
            imports: with what other workers sent of the layers that the donor does not have; not
                to be used after this.

        Raises:
            KVIncomplete: not all has arrived. Nothing was touched.
            KVTransferError: nobody sent one of the layers. Nothing was touched.
            ValueError: this stage holds sequences already.
        """
        assemble(self._cache, self.layers, (donor._cache, donor.layers) if donor else None, imports)

    def _warm_up(self) -> None:
        """Compute one token and forget it: measures the KV cache and makes kernels ready."""
        token_ids, hidden_states = self.inputs.made_up(1)
        step = self._begin([SequenceSlice(sequence_id=_WARM_UP, start=0, num_tokens=1)], token_ids)
        with torch.inference_mode(), running(step), kernels_for(len(token_ids)):
            self._forward(step, token_ids, hidden_states, [0] if self._last else [])
        self._cache.free([_WARM_UP])

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
        """Return how many positions are held that the slice could go on from; None if enough."""
        told = part.sampling is not None or part.sequence_id in self._samplings
        if self._last and part.sample and not told:
            return 0  # as good as lost: whoever starts it again says how to sample
        prefix = part.prefix
        if prefix is None or part.sequence_id in self._cache:
            have = self._cache.length(part.sequence_id)
            return have if have < part.start else None
        return 0 if self._cache.length(prefix.sequence_id) < prefix.length else None

    def _note(self, sequences: Sequence[SequenceSlice]) -> None:
        """Keep how sequences are sampled; note that those taken are no more."""
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
            slices.append(PackedSlice(part.sequence_id, part.start, row, part.num_tokens))
            row = stop
        return PackedStep(self._cache, self.layers.start, tuple(slices), [0] * len(self.layers))

    def _compute(
        self,
        sequences: Sequence[SequenceSlice],
        step: PackedStep,
        token_ids: Tensor,
        hidden_states: Tensor | None,
    ) -> StageOutput:
        if not self._last:
            given = self._forward(step, token_ids, hidden_states, [])
            assert given is not None
            last_rows = [s.row + s.num_tokens - 1 for s in step.slices]
            self._check_finite(given[last_rows], "hidden states")
            return StageOutput(hidden_states=given)
        ends = [s for s, part in zip(step.slices, sequences, strict=True) if part.sample]
        rows = [s.row + s.num_tokens - 1 for s in ends]
        logits = self._forward(step, token_ids, hidden_states, rows)
        if logits is None:
            return StageOutput(token_ids=torch.empty(0, dtype=torch.int32))
        if len(logits) != len(ends):
            raise StageError(f"the model gave {len(logits)} rows of logits for {len(ends)} tokens")
        self._check_finite(logits, "logits")
        return self._sample(ends, logits)

    def _forward(
        self, step: PackedStep, token_ids: Tensor, hidden_states: Tensor | None, rows: list[int]
    ) -> Tensor | None:
        """Run the layers; return hidden states [tokens, hidden_size], or logits of the last stage.

        Logits are [rows, vocab_size], of these rows; None without any.
        """
        positions = [torch.arange(s.start, s.start + s.num_tokens) for s in step.slices]
        inputs = {
            "input_ids": token_ids.to(self._device, torch.int64)[None],
            "position_ids": torch.cat(positions).to(self._device)[None],
            "use_cache": False,
        }
        if hidden_states is not None:
            self._hooks.incoming = hidden_states.to(self._device, self._dtype)[None]
        try:
            if rows:
                kept = torch.tensor(rows, device=self._device)
                given = self._model(**inputs, logits_to_keep=kept).logits
            else:
                self._decoder(**inputs)
                given = self._hooks.outgoing
        finally:
            self._hooks.forget()
        _check_every_layer_ran(step)
        return None if given is None else given[0]

    def _sample(self, ends: Sequence[PackedSlice], logits: Tensor) -> StageOutput:
        samplings = [self._samplings[s.sequence_id] for s in ends]
        positions = [s.start + s.num_tokens for s in ends]
        histories = [self._cache.tokens(s.sequence_id, s.start + s.num_tokens) for s in ends]
        token_ids = sample(logits, samplings, positions, histories)
        asked = [s.logprobs for s in samplings if s.logprobs is not None]
        if not asked:
            return StageOutput(token_ids=token_ids)
        logprobs, logprob_ids = log_probabilities(logits, token_ids, max(asked))
        return StageOutput(token_ids=token_ids, logprobs=logprobs, logprob_ids=logprob_ids)

    def _check_finite(self, values: Tensor, what: str) -> None:
        # The extremes of a tensor with a NaN are NaN; argmax would name a token for it in silence.
        lowest, highest = torch.aminmax(values)
        if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
            raise StageError(
                f"the {what} after layers {self.layers} are not finite: the weights on this "
                f"machine are damaged, or {self._dtype} is too narrow for this model"
            )


def _check_every_layer_ran(step: PackedStep) -> None:
    if any(count != 1 for count in step.appended):
        raise StageError(f"the layers called their attention {step.appended} times; once is right")
