"""Answers to messages of the coordinator that this worker cannot read. Pure."""

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    CopyKV,
    HandOver,
    KVFailed,
    LoadStage,
    NotUnderstood,
    StageFailed,
    Task,
    TaskFailed,
    tag_of,
)


def not_done(error: RemoteProtocolError) -> TaskFailed | StageFailed | KVFailed | NotUnderstood:
    """Return the answer that says that what a message wanted is not done.

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
