"""Messages from the coordinator to workers. `Task` also goes from worker to worker."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from distributed_llm.common.keys import NOBODY, PublicKey
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.messages.base import (
    MAX_STAGES,
    Addresses,
    Label,
    Message,
    Name,
    StageTimes,
    Tensors,
    Text,
    Value,
)
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.types import Count, Epoch, LayerRange, Seconds, SequenceId, StepNumber
from distributed_llm.common.weight_forms import Quantize

MAX_SLICES = 512
"""Slices in one task at most."""

MAX_RELEASED = 1024
"""Sequences that one message frees at most."""

MAX_RANGES = 64
"""Ranges of layers of which a source is said to have the weights, at most."""

MAX_SOURCES = 16
"""Workers that one order names as sources of weights at most."""

SequenceIds = Annotated[tuple[SequenceId, ...], Meta(max_length=MAX_RELEASED)]


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Coordinator -> worker: answers `WorkerHello`; the session has begun.

    Attributes:
        worker_id: the worker's name, made unique among those that are connected.
    """

    worker_id: Name
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


class Renamed(Message, frozen=True, kw_only=True, tag="renamed"):
    """Coordinator -> worker: from now on it has the name that it asked for.

    Another session had that name when it joined, and has ended. Sent while it has no layers, as its
    neighbours know a worker by its name.
    """

    worker_id: Name


class ModelSource(Value, frozen=True, kw_only=True):
    """Where a worker finds the checkpoint.

    Attributes:
        kind: "builtin" (in the package), "folder" (same path on every machine) or "hub".
        name: empty, the path of the folder, or the id on the hub.
        revision: commit on the hub; empty for other kinds.
    """

    kind: Literal["builtin", "folder", "hub"]
    name: Annotated[str, Meta(max_length=4096)]
    revision: Label = ""


class NextStage(Value, frozen=True, kw_only=True):
    """The worker of the next stage.

    Attributes:
        addresses: at which it may be reached, best first.
        key: that it has to hold.
    """

    worker: Name
    addresses: Addresses
    key: PublicKey = NOBODY


class WeightSource(Value, frozen=True, kw_only=True):
    """A worker that gives weights of `layers` to others.

    Attributes:
        addresses: at which it may be reached, best first.
        key: that it has to hold.
    """

    worker: Name
    addresses: Addresses
    layers: Annotated[tuple[LayerRange, ...], Meta(max_length=MAX_RANGES)]
    key: PublicKey = NOBODY


class LoadStage(Message, frozen=True, kw_only=True, tag="load_stage"):
    """Coordinator -> worker: load layers, to serve them as a stage of `epoch`.

    Answered by `StageReady` or `StageFailed`. Layers and KV cache of older epochs are dropped
    first, but for those of `beside`: that epoch is served until `DropStage` or the first task of
    `epoch`. A newer order replaces one that loads beside; `UndoMove` gives it up.

    Attributes:
        dtype: dtype of weights and computation, and of KV cache if `kv_dtype` is auto. Stages of an
            epoch may have different ones.
        wire_dtype: dtype of activations between stages.
        quantize: what floating-point matrices of the layers become while they are loaded.
        kv_dtype: how keys and values are kept.
        context_length: positions of the longest text that is served; 0: as many as the model can.
        from_disk: layers that stay on the disk; which ones, `offloading.away` says.
        from_ram: of those that stay in the machine's memory, beside a GPU.
        digest: `Checkpoint.digest` of the layers, which the worker's files must have.
        kv_tokens: positions, of all sequences together, that the KV cache must have room for.
        workspace_bytes: that a step may take beside weights and KV cache.
        link_key: key that a worker must know to send tasks and KV cache of `epoch`.
        next_stage: the next stage, to be reached directly if possible; None on the last stage.
        beside: the epoch that is served meanwhile, perhaps by this worker too; a handover may pass
            its KV cache on to `epoch`. None: `epoch` is loaded alone.
        trials: run trial steps of several sizes before `StageReady`, unless other layers serve.
        imports: layers whose KV cache other workers will send, one range per worker.
        senders: keys of the workers that may connect, to send tasks and KV cache of `epoch`.
        sources: workers that give weights of the layers, besides the coordinator.
    """

    epoch: Epoch
    source: ModelSource
    layers: LayerRange
    dtype: DtypeName
    wire_dtype: DtypeName
    quantize: Quantize = "none"
    kv_dtype: KVDtype = "auto"
    context_length: Count = 0
    from_disk: Count = 0
    from_ram: Count = 0
    digest: Label
    kv_tokens: Count
    workspace_bytes: Count = 0
    link_key: Label
    next_stage: NextStage | None = None
    beside: Epoch | None = None
    trials: bool = False
    imports: Annotated[tuple[LayerRange, ...], Meta(max_length=MAX_STAGES)] = ()
    senders: Annotated[tuple[PublicKey, ...], Meta(max_length=MAX_STAGES)] = ()
    sources: Annotated[tuple[WeightSource, ...], Meta(max_length=MAX_SOURCES)] = ()


class GiveWeights(Message, frozen=True, kw_only=True, tag="give_weights"):
    """Coordinator -> worker: these workers may read its weights from now on, and no others.

    Attributes:
        readers: their keys.
    """

    readers: Annotated[tuple[PublicKey, ...], Meta(max_length=MAX_STAGES)]


class KVTransfer(Value, frozen=True, kw_only=True):
    """Layers whose KV cache is to be sent, and the worker to send it to.

    Attributes:
        key: that the worker has to hold.
    """

    layers: LayerRange
    worker: Name
    addresses: Addresses
    key: PublicKey = NOBODY


class CopyKV(Message, frozen=True, kw_only=True, tag="copy_kv"):
    """Coordinator -> worker: copy KV cache to the workers that have its layers in `epoch`.

    Answered by `KVCopied` or `KVFailed`. The worker serves meanwhile, and may itself have no layers
    in `epoch`.

    Attributes:
        link_key: link key of `epoch`.
    """

    epoch: Epoch
    link_key: Label
    transfers: Annotated[tuple[KVTransfer, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class HandOver(Message, frozen=True, kw_only=True, tag="hand_over"):
    """Coordinator -> worker: begins the handover to `epoch`: no step is in flight.

    A worker that sends KV cache sends what has changed since it was copied, and a manifest of what
    it holds. A worker with layers in `epoch` waits for that, adds its own KV cache and answers
    `HandedOver`. Tasks of the served epoch are void from now on, unless `UndoMove` follows.

    Attributes:
        first_step: the first step that the served epoch will run if the move is undone. Its task
            may come from another worker before `UndoMove` comes, and says the same.
        set_back: sequences of which the latest step was abandoned, so that some stages are to go on
            from where it began. Of others, layers with a state of their own need only the latest
            one and snapshots.
    """

    epoch: Epoch
    first_step: StepNumber
    set_back: SequenceIds = ()


class UndoMove(Message, frozen=True, kw_only=True, tag="undo_move"):
    """Coordinator -> worker: `epoch` is given up; the served epoch continues.

    Frees layers that were loaded beside, and stops sending KV cache.
    """

    epoch: Epoch


class SharedPrefix(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """The first `length` positions of another sequence, with which a sequence begins.

    Attributes:
        take: whether the other sequence ends by this, and its buffers are continued.
    """

    sequence_id: SequenceId
    length: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    take: bool = False


class SequenceSlice(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Positions `[start, start + num_tokens)` of one sequence, which a task computes.

    Attributes:
        sample: whether to sample the token after the last position.
        sampling: how to sample from now on; in the first slice that samples, and again after the
            sequence may have been lost.
        prefix: in the first slice of a sequence whose first `start` positions are shared.
        masked: whether a mask says which tokens may be sampled.
        embed: whether to sum up the model's last hidden states at these positions; does not sample.
        snapshot: whether layers with a state of their own keep it as it is after these positions
            for as long as the sequence is held, so that computing can go on from there again.
        source: how many of the sequence's first positions are what an encoder reads. All of them
            are computed in one task, which computes nothing else of any sequence.
    """

    sequence_id: SequenceId
    start: Count
    num_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    sample: bool = False
    sampling: Sampling | None = None
    prefix: SharedPrefix | None = None
    masked: bool = False
    embed: bool = False
    snapshot: bool = False
    source: Count = 0

    @property
    def is_source(self) -> bool:
        """Whether the positions are what an encoder reads."""
        return self.start < self.source


class SeenFrom(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Layers with a window see a sequence from `position` on, and need not keep what is before."""

    sequence_id: SequenceId
    position: Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Task(Message, frozen=True, kw_only=True, tag="task", omit_defaults=True):
    """Coordinator -> worker, or worker -> worker: one step on one stage, for a packed batch.

    `tensors` is [token_ids [tokens] int32], and on all stages but the first of the step
    hidden_states [tokens, hidden_size] in the wire dtype; tokens is the sum of `num_tokens`. If any
    slice is masked, masks [masked slices, bytes] uint8 follow: bit i % 8 of byte i // 8, the lowest
    first, says whether token i may be sampled; tokens beyond must not be.

    Attributes:
        oldest: steps with smaller numbers are void and must not be run.
        released: sequences to free before this step, which may need their memory.
        seen_from: what of other sequences to drop then.
        route: for each remaining hop, whether the stage sends the task to the next worker directly
            (true) or its result to the coordinator (false). Empty on the last stage, which always
            answers the coordinator.
        timings: one per stage that has run the step.
    """

    epoch: Epoch
    step: StepNumber
    oldest: StepNumber
    sequences: Annotated[tuple[SequenceSlice, ...], Meta(min_length=1, max_length=MAX_SLICES)]
    tensors: Tensors
    released: SequenceIds = ()
    seen_from: Annotated[tuple[SeenFrom, ...], Meta(max_length=MAX_RELEASED)] = ()
    route: Annotated[tuple[bool, ...], Meta(max_length=MAX_STAGES)] = ()
    timings: StageTimes = ()

    @property
    def num_masks(self) -> int:
        """Number of slices with a mask."""
        return sum(part.masked for part in self.sequences)


class ReleaseSequences(Message, frozen=True, kw_only=True, tag="release_sequences"):
    """Coordinator -> worker: free the KV cache of sequences; sent while no step is in flight.

    The next task repeats it in `released`, because it may overtake this message on its way from
    worker to worker.
    """

    epoch: Epoch
    sequence_ids: SequenceIds


class DropStage(Message, frozen=True, kw_only=True, tag="drop_stage"):
    """Coordinator -> worker: free the layers of all epochs up to this one.

    A newer epoch that was loaded beside is served from now on.
    """

    epoch: Epoch


class Notice(Message, frozen=True, kw_only=True, tag="notice"):
    """Coordinator -> worker: something for its log, such as why it has no layers."""

    text: Text


class MayLeave(Message, frozen=True, kw_only=True, tag="may_leave"):
    """Coordinator -> worker, after `Leaving` or a drain: it may leave.

    Others have its layers, or nobody can have them.

    Attributes:
        why: reason, for people.
    """

    why: Text = ""
