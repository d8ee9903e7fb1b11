"""What a report of a worker that the coordinator cannot read is taken for. Pure."""

from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    HandedOver,
    KVCopied,
    KVFailed,
    StageFailed,
    StageReady,
    TaskFailed,
    TaskResult,
    tag_of,
)


def failure_of(error: RemoteProtocolError) -> TaskFailed | StageFailed | KVFailed | None:
    """Return the failure that a report stands for that cannot be read; None if nobody waits.

    Args:
        error: of reading it.
    """
    outline, why = error.outline, f"The coordinator cannot read its report ({error})."[:4096]
    epoch, code = outline.epoch, error.code
    if epoch is None:
        return None
    if outline.type in (tag_of(TaskResult), tag_of(TaskFailed)) and outline.step is not None:
        return TaskFailed(epoch=epoch, step=outline.step, code=code, message=why)
    if outline.type in (tag_of(StageReady), tag_of(StageFailed)):
        return StageFailed(epoch=epoch, code=code, message=why)
    if outline.type in (tag_of(KVCopied), tag_of(HandedOver), tag_of(KVFailed)):
        return KVFailed(epoch=epoch, worker="", code=code, message=why)
    return None
