"""Tells whoever waits for the effect of a message that this worker cannot read. Pure."""

from collections.abc import Mapping

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    CopyKV,
    HandOver,
    KVEnd,
    KVFailed,
    KVPieces,
    LoadStage,
    NotUnderstood,
    StageFailed,
    Task,
    TaskFailed,
    tag_of,
)
from distributed_llm.common.types import Epoch
from distributed_llm.worker.session.epoch_stage import EpochStage
from distributed_llm.worker.session.events import Action, Send
from distributed_llm.worker.session.kv_move import KVMove
from distributed_llm.worker.session.link_events import PeerGarbage

_KV_TAGS = (tag_of(KVPieces), tag_of(KVEnd))


def not_done(error: RemoteProtocolError) -> TaskFailed | StageFailed | KVFailed | NotUnderstood:
    """Return the answer that says that what a message of the coordinator wanted is not done.

    Args:
        error: of reading it.
    """
    outline, why = error.outline, f"It cannot read what it is to do ({error})."[:4096]
    epoch, code = outline.epoch, error.code
    if epoch is not None:
        if outline.type == tag_of(Task) and outline.step is not None:
            return TaskFailed(epoch=epoch, step=outline.step, code=code, message=why)
        if outline.type == tag_of(LoadStage):
            return StageFailed(epoch=epoch, code=code, message=why)
        if outline.type in (tag_of(CopyKV), tag_of(HandOver)):
            return KVFailed(epoch=epoch, worker="", code=code, message=why)
    return NotUnderstood(what=outline.type, why=str(error)[:4096])


def not_received(
    event: PeerGarbage, stages: Mapping[Epoch, EpochStage], move: KVMove | None
) -> list[Action]:
    """Fail the step or the transfer of KV cache that a message of another worker was part of.

    Only of workers that said hello, or welcomed this one: anybody may send garbage.

    Args:
        event: the message that cannot be read.
        stages: of this worker.
        move: that is under way here.
    """
    error = event.error
    if event.link is not None:
        return move.unread_answer(event.link, error) if move else []
    if event.peer is None or not isinstance(error, RemoteProtocolError):
        return []
    if move and move.comes_from(event.peer):
        return move.unread(error)
    epoch = error.outline.epoch
    stage = stages.get(epoch) if epoch is not None else None
    if stage is None or not stage.peers.knows(event.peer):
        return []
    if error.outline.type in _KV_TAGS:
        return move.unread(error) if move and move.epoch == epoch else []
    told = not_done(error)
    return [Send(told)] if isinstance(told, TaskFailed) else []
