"""What the hub or its library refuses, as errors that say what to do."""

import errno
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import errors

from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.model_files import may_pass

_T = TypeVar("_T")


def reporting(name: str, action: Callable[[], _T]) -> _T:
    """Return what `action` returns.

    Raises:
        CheckpointUnavailable: the hub cannot be reached now, or the disk is full.
        CheckpointError: instead of whatever else it raises. The hub's library changes its HTTP
            client, and with it the exceptions, from version to version; hence all of them.
    """
    try:
        return action()
    except Exception as exc:
        raise _explained(name, exc) from exc


def _explained(name: str, exc: Exception) -> CheckpointError:
    match exc:
        case errors.GatedRepoError():
            return CheckpointError(
                f"{name} is gated: its owner wants you to accept a licence. Do so at "
                f"https://huggingface.co/{name}, then run `hf auth login` on this machine, or set "
                "HF_TOKEN here. This machine is enough: workers get the weights from it."
            )
        case errors.RevisionNotFoundError():
            return CheckpointError(
                f"{name} has no such revision on the hub. Check what stands after the @."
            )
        case errors.RepositoryNotFoundError():
            return CheckpointError(
                f"The hub has no model {name}, or it is private. Check the spelling; for a "
                "private model run `hf auth login` on this machine."
            )
        case errors.SafetensorsParsingError():
            return CheckpointError(
                f"The weights of {name} on the hub are broken ({exc}). Choose another model."
            )
        case errors.OfflineModeIsEnabled():
            return CheckpointError(_not_fetched(name, "HF_HUB_OFFLINE is set"))
        case errors.LocalEntryNotFoundError() if isinstance(exc.__cause__, Exception):
            return _explained(name, exc.__cause__)
        case errors.RemoteEntryNotFoundError():
            return CheckpointError(
                f"The index of {name} names a file that is not there on the hub. Choose another "
                "revision or version of the model."
            )
        case errors.HfHubHTTPError():
            return _refused(name, exc.response.status_code)
        case OSError(errno=errno.ENOSPC):
            return CheckpointUnavailable(
                f"The disk is full; {name} does not fit. Free some space, or set HF_HOME to a "
                "folder on another disk, and start again: what was downloaded is kept."
            )
        case OSError(errno=code) if code is not None and exc.filename is not None:
            kind = CheckpointUnavailable if may_pass(exc) else CheckpointError
            return kind(
                f"{name} cannot be stored: {exc}. Set HF_HOME to a folder that can be written."
            )
    return CheckpointUnavailable(_not_fetched(name, f"{type(exc).__name__}: {str(exc)[:300]}"))


def _refused(name: str, status: int) -> CheckpointError:
    if status in (401, 403):
        return CheckpointError(
            f"The hub refuses {name} (HTTP {status}). Run `hf auth login` on this machine with a "
            "token that may read it, and check that no old HF_TOKEN is set."
        )
    return CheckpointUnavailable(_not_fetched(name, f"the hub answers HTTP {status}"))


def _not_fetched(name: str, reason: str) -> str:
    return (
        f"{name} cannot be fetched from the hub: {reason}. What was downloaded is kept; try again "
        "when the hub can be reached, or give the path of a folder with the model."
    )
