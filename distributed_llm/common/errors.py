"""All exceptions of this package.

* DistributedLLMError
  x ConfigError                a setting or flag is wrong
  x InvalidRequest             a prompt or generation parameter is wrong
    + ContextLengthExceeded    prompt and answer do not fit the model's context
  x CheckpointError            the model's files are missing or broken
    + UnsupportedModel         the architecture cannot be split correctly
    + CheckpointMismatch       this machine has other weights under the same name
    + CheckpointUnavailable    they cannot be read or fetched now; later they may be
      x WrongContent           other weights came than those that were asked for
      x FetchFailed            they cannot be had from other machines
  x CapacityError              the cluster cannot do this now
    + NotEnoughMemory          the model does not fit the workers
    + NotReady                 no plan is being served
    + Overloaded               the queue is full; try again later
  x ConnectionFailed           the other end cannot be reached
    + CoordinatorUnreachable   nobody answers at the address
    + CoordinatorLost          it answered before and fell silent
    + AddressInUse             the port to listen on is taken
  x NotAllowed                 the key of this machine may not do this
    + NotEnrolled              the coordinator does not know the key of this machine
    + Quarantined              this machine broke the protocol too often; later it may connect
    + WrongServerKey           what answers at the address is not the coordinator that is known
  x WorkerLost                 workers died and the others cannot replace them
  x StageError                 a worker failed to run its layers
  x TextError                  the coordinator failed to turn text into tokens, or tokens into text
  x RequestCancelled           the request was cancelled
  x DeadlineExceeded           the request did not finish within its timeout_s
  x OutputFailed               what was asked for cannot be written to standard output
  x ServiceFailed              a service of this machine cannot be installed or removed
  x ProtocolError              the wire protocol was violated
    + LocalProtocolError       by us: a bug here
    + RemoteProtocolError      by the peer: say so, drop the message, keep serving
    + ProtocolMismatch         the peer speaks another version

Messages are for people: what happened, why, and what to do. `code` is the stable name on the wire,
`exit_code` the exit code of the command line.
"""

from typing import ClassVar

from distributed_llm.common.types import Outline


class DistributedLLMError(Exception):
    """Base class of all errors raised by this package."""

    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1


class ConfigError(DistributedLLMError):
    """A setting, a flag or a file of settings is wrong."""

    code = "config"
    exit_code = 2


class InvalidRequest(DistributedLLMError):
    """A prompt or a generation parameter is wrong. Sending it again will not help."""

    code = "invalid_request"
    exit_code = 2


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context."""

    code = "context_length_exceeded"


class CheckpointError(DistributedLLMError):
    """The files of a model are missing, broken or of an unknown format."""

    code = "checkpoint"
    exit_code = 2


class UnsupportedModel(CheckpointError):
    """The architecture cannot be split into stages that compute what the whole model computes."""

    code = "unsupported_model"


class CheckpointMismatch(CheckpointError):
    """A worker has other weights than the coordinator under the same name."""

    code = "checkpoint_mismatch"


class CheckpointUnavailable(CheckpointError):
    """The files of a model cannot be read or fetched now. Trying again later may help."""

    code = "checkpoint_unavailable"


class WrongContent(CheckpointUnavailable):
    """Weights came that are not those that were asked for. Others may have the right ones."""

    code = "wrong_content"


class FetchFailed(CheckpointUnavailable):
    """Weights cannot be had from other machines now."""

    code = "fetch_failed"


class CapacityError(DistributedLLMError):
    """The cluster as it is now cannot do what was asked."""

    code = "no_capacity"
    exit_code = 4


class NotEnoughMemory(CapacityError):
    """The model, or the KV cache of a request, does not fit the workers' memory."""

    code = "not_enough_memory"


class NotReady(CapacityError):
    """No plan is being served, and none is being prepared."""

    code = "not_ready"


class Overloaded(CapacityError):
    """The queue of waiting requests is full.

    Args:
        message: what happened, why, what to do.
        retry_after_s: time to wait before trying again.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConnectionFailed(DistributedLLMError):
    """The other end of a connection cannot be reached."""

    code = "connection_failed"
    exit_code = 3


class CoordinatorUnreachable(ConnectionFailed):
    """Nobody answers at the coordinator's address."""

    code = "coordinator_unreachable"


class CoordinatorLost(ConnectionFailed):
    """The coordinator answered before and has fallen silent."""

    code = "coordinator_lost"


class AddressInUse(ConnectionFailed):
    """The address to listen on is taken or does not belong to this machine."""

    code = "address_in_use"
    exit_code = 2


class NotAllowed(DistributedLLMError):
    """The key of this machine, or a token, may not do what was asked."""

    code = "not_allowed"
    exit_code = 3


class NotEnrolled(NotAllowed):
    """This machine has no key for the coordinator, or one that it does not know."""

    code = "not_enrolled"


class Quarantined(NotAllowed):
    """This machine broke the protocol too often, and may not connect for some time."""

    code = "quarantined"


class WrongServerKey(NotAllowed):
    """What answers at the address does not hold the key of the coordinator that is known there."""

    code = "wrong_server_key"


class WorkerLost(DistributedLLMError):
    """Workers died, over a request or until the others could not hold the model."""

    code = "worker_lost"


class StageError(DistributedLLMError):
    """A worker failed to load or to run its layers."""

    code = "stage_error"


class TextError(DistributedLLMError):
    """The coordinator failed to turn a prompt into tokens, or the tokens of an answer into text."""

    code = "text_error"


class RequestCancelled(DistributedLLMError):
    """The request was cancelled before it finished."""

    code = "cancelled"


class DeadlineExceeded(DistributedLLMError):
    """The request did not finish within its `timeout_s`."""

    code = "deadline_exceeded"
    exit_code = 4


class OutputFailed(DistributedLLMError):
    """Standard output of a command is full or closed."""

    code = "output"


class ServiceFailed(DistributedLLMError):
    """A service of this machine's system cannot be installed or removed."""

    code = "service"


class ProtocolError(DistributedLLMError):
    """The wire protocol was violated."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """This program tried something that the protocol forbids: a bug here."""

    code = "local_protocol"


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids.

    Args:
        reason: name of a counter, from a fixed set.
        detail: exactly what it was, for the log.
        outline: what can be read of the message.
    """

    code = "remote_protocol"

    def __init__(self, reason: str, detail: str, outline: Outline | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.outline = outline or Outline()


class ProtocolMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""

    code = "unsupported_version"
    exit_code = 3


def internal_error(exc: BaseException) -> DistributedLLMError:
    """Return the error with which a process ends that met a bug of its own."""
    return DistributedLLMError(f"Internal error: {exc!r}. Please report it.")


_BY_CODE: dict[str, type[DistributedLLMError]] = {
    kind.code: kind
    for kind in (
        ConfigError,
        InvalidRequest,
        ContextLengthExceeded,
        CheckpointError,
        UnsupportedModel,
        CheckpointMismatch,
        CheckpointUnavailable,
        WrongContent,
        FetchFailed,
        CapacityError,
        NotEnoughMemory,
        NotReady,
        CoordinatorUnreachable,
        CoordinatorLost,
        WorkerLost,
        StageError,
        TextError,
        RequestCancelled,
        DeadlineExceeded,
        ProtocolMismatch,
        NotAllowed,
        NotEnrolled,
        Quarantined,
        WrongServerKey,
    )
}


def error_from_wire(code: str, message: str, retry_after_s: float) -> DistributedLLMError:
    """Return the exception with this `code`; `DistributedLLMError` if the code is unknown."""
    if code == Overloaded.code:
        return Overloaded(message, retry_after_s)
    return _BY_CODE.get(code, DistributedLLMError)(message)
