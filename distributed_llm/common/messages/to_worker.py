"""What the coordinator tells workers. Tasks also go from worker to worker."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

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
from distributed_llm.common.types import Count, LayerRange, Seconds

MAX_SLICES = 512
"""Sequences in one task."""

MAX_RELEASED = 1024
SequenceIds = Annotated[tuple[Count, ...], Meta(max_length=MAX_RELEASED)]


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Coordinator -> worker: the session exists."""

    worker_id: Name
    heartbeat_interval_s: Seconds
    silence_timeout_s: Seconds


class ModelSource(Value, frozen=True, kw_only=True):
    """Where a worker finds the checkpoint.

    Attributes:
        kind: "builtin" (in the package), "folder" (same path on every machine) or "hub".
        name: empty, the folder's path, or the hub id.
        revision: commit on the hub, else empty.
    """

    kind: Literal["builtin", "folder", "hub"]
    name: Annotated[str, Meta(max_length=4096)]
    revision: Label = ""


class NextStage(Value, frozen=True, kw_only=True):
    """The worker of the stage after this one, and where it may be reached."""

    worker: Name
    addresses: Addresses


class LoadStage(Message, frozen=True, kw_only=True, tag="load_stage"):
    """Coordinator -> worker: load these layers, to serve them under `epoch`.

    Layers and KV cache of older epochs are dropped, unless it is `beside` them: then the served
    epoch goes on, also while this loads, until `DropStage` or the first task of this epoch. Of what
    loads beside, a newer order takes the place; `CancelStage` gives it up.

    Attributes:
        beside: keep serving. `TakeOver` may hand the KV cache on to this epoch.
        trials: try steps of several sizes before `StageReady`, unless other layers are served.
        imports: layers whose KV cache other workers will send, each range by one of them.
        digest: what `Checkpoint.digest` of the layers must be on the worker.
        dtype: of weights, KV cache and computing.
        wire_dtype: of activations between stages.
        kv_tokens: positions of all sequences together that the KV cache must have room for.
        link_key: whoever hands this worker tasks of this epoch must know it.
        next_stage: to try to reach; None on the last stage.
    """

    epoch: Count
    source: ModelSource
    layers: LayerRange
    dtype: DtypeName
    wire_dtype: DtypeName
    digest: Label
    kv_tokens: Count
    link_key: Label
    next_stage: NextStage | None = None
    beside: bool = False
    trials: bool = False
    imports: Annotated[tuple[LayerRange, ...], Meta(max_length=MAX_STAGES)] = ()


class KVTransfer(Value, frozen=True, kw_only=True):
    """Layers whose KV cache a worker is to send, to whom, and where it may be reached."""

    layers: LayerRange
    worker: Name
    addresses: Addresses


class CopyKV(Message, frozen=True, kw_only=True, tag="copy_kv"):
    """Coordinator -> worker: send KV cache of the served epoch to who has the layers in `epoch`.

    It goes on serving meanwhile, and may have no layers in `epoch` itself.

    Attributes:
        link_key: of `epoch`.
    """

    epoch: Count
    link_key: Label
    transfers: Annotated[tuple[KVTransfer, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class TakeOver(Message, frozen=True, kw_only=True, tag="take_over"):
    """Coordinator -> worker: no step of the served epoch is under way any more; `epoch` goes on.

    A worker that sends KV cache sends what has changed, and what it holds. One that has layers in
    `epoch` waits for that, takes over what is its own, and answers `TookOver`. From now on tasks of
    the served epoch are void, until `CancelStage` takes this back.
    """

    epoch: Count


class CancelStage(Message, frozen=True, kw_only=True, tag="cancel_stage"):
    """Coordinator -> worker: `epoch` is not to be; go on with what is served.

    Frees layers that were loaded beside, and ends what is sent.
    """

    epoch: Count


class SharedPrefix(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """A sequence begins as the first `length` positions of another that the stages hold.

    Attributes:
        take: the other sequence ends with this; nothing else needs it.
    """

    sequence_id: Count
    length: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    take: bool = False


class SequenceSlice(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """The part of one sequence that a task computes: positions `[start, start + num_tokens)`.

    Attributes:
        sample: pick the token after the last of them.
        sampling: how, from now on; with the first slice that samples, and again after a restart.
        prefix: with the first slice of a sequence whose first `start` positions are another's.
    """

    sequence_id: Count
    start: Count
    num_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    sample: bool = False
    sampling: Sampling | None = None
    prefix: SharedPrefix | None = None


class Task(Message, frozen=True, kw_only=True, tag="task", omit_defaults=True):
    """Coordinator -> worker, or worker -> worker: one step on one stage, for a packed batch.

    `tensors` is [token_ids [tokens] int32] and, on all stages but the first,
    hidden_states [tokens, hidden_size] in the wire dtype; tokens is the sum of `num_tokens`.

    Attributes:
        oldest: steps with smaller numbers are void; those that arrive later are not run.
        released: sequences to free before this step: their memory may be what it needs.
        route: for each hop that is left: to the next worker itself (true), or to the coordinator.
            Empty on the last stage, which always answers the coordinator.
        timings: of the stages that the step has passed.
    """

    epoch: Count
    step: Count
    oldest: Count
    sequences: Annotated[tuple[SequenceSlice, ...], Meta(min_length=1, max_length=MAX_SLICES)]
    tensors: Tensors
    released: SequenceIds = ()
    route: Annotated[tuple[bool, ...], Meta(max_length=MAX_STAGES)] = ()
    timings: StageTimes = ()


class ReleaseSequences(Message, frozen=True, kw_only=True, tag="release_sequences"):
    """Coordinator -> worker: free the KV cache of these sequences, while no step is under way.

    The next task says it again: handed on from worker to worker, it may be faster than this.
    """

    epoch: Count
    sequence_ids: SequenceIds


class DropStage(Message, frozen=True, kw_only=True, tag="drop_stage"):
    """Coordinator -> worker: free the layers of all epochs up to this one.

    One that was loaded beside, and is newer, is served from now on.
    """

    epoch: Count


class MayLeave(Message, frozen=True, kw_only=True, tag="may_leave"):
    """Coordinator -> worker: end; nobody needs it. Answers `Leaving`, or somebody drained it.

    Attributes:
        why: for the operator.
    """

    why: Text = ""
