"""What a disk refuses while weights are kept on it, as errors that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.model_files import may_pass
from distributed_llm.common.wording import size_text

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def storing(folder: Path, missing_bytes: int = 0) -> Iterator[None]:
    """Do something to the files of a cache.

    Args:
        folder: of the cache.
        missing_bytes: what is still to be written of an entry.

    Raises:
        CheckpointUnavailable: the disk is full, or fails just now.
        CheckpointError: the files cannot be written before somebody changes something.
    """
    try:
        yield
    except OSError as exc:
        raise _explained(folder, missing_bytes, exc) from exc


def _explained(folder: Path, missing_bytes: int, exc: OSError) -> CheckpointError:
    what = exc.filename or folder
    elsewhere = f"or set {CACHE_VARIABLE} to a folder"
    match exc:
        case OSError(errno=code) if code in _FULL:
            full = "The disk" if code == errno.ENOSPC else "Your quota on the disk"
            lacking = f"; room for {size_text(missing_bytes)} more is needed" * (missing_bytes > 0)
            return CheckpointUnavailable(
                f"{full} of {folder} is full{lacking}. Free some space (`dllm cache prune` deletes "
                f"weights that are kept), {elsewhere} on another disk, and start again: what was "
                "fetched is kept."
            )
        case FileExistsError() | NotADirectoryError():
            return CheckpointError(
                f"{what}: a file is where a folder should be; weights are to be kept in {folder}. "
                f"Move the file away, {elsewhere} for them."
            )
        case PermissionError() | OSError(errno=errno.EROFS):
            return CheckpointError(
                f"{what} cannot be written: {exc.strerror or exc}. Weights are kept in {folder}: "
                f"let the user who runs dllm write there, {elsewhere} of theirs."
            )
    kind = CheckpointUnavailable if may_pass(exc) else CheckpointError
    return kind(
        f"{what} cannot be written: {exc.strerror or exc}. Check the disk or share that it is on, "
        f"{elsewhere} on another disk."
    )
