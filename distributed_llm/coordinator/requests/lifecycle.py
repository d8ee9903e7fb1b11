"""The states of a request, and what leads from one to the next.

A request waits until a pipeline has room for its prompt, and runs until its last token is known.
Then it is closing: only the text of its last tokens is missing. It goes back from running to
waiting when its KV cache is given up, and may fail in every state. A stop string is found in the
text, which comes later than the tokens, so the request may be in any state by then.
"""

from enum import Enum, auto

from distributed_llm.common.states import StateTable


class RequestState(Enum):
    """Where a request is in its life."""

    WAITING = auto()
    RUNNING = auto()
    CLOSING = auto()
    GONE = auto()


class RequestCause(Enum):
    """What changes the state of a request.

    Attributes:
        ADMITTED: a pipeline has room for it.
        PREEMPTED: its KV cache was given up for an older request.
        PIPELINE_GONE: the pipeline it ran on was dissolved.
        LAST_TOKEN: its last token was sampled.
        TEXT_SENT: the text of all its tokens was sent.
        STOP_STRING: a stop string was found in its text.
        FAILED: it ends with an error, was cancelled, or its client is gone.
    """

    ADMITTED = auto()
    PREEMPTED = auto()
    PIPELINE_GONE = auto()
    LAST_TOKEN = auto()
    TEXT_SENT = auto()
    STOP_STRING = auto()
    FAILED = auto()


REQUEST_STATES = StateTable(
    "a request",
    RequestState.WAITING,
    {
        (RequestState.WAITING, RequestCause.ADMITTED): RequestState.RUNNING,
        (RequestState.WAITING, RequestCause.STOP_STRING): RequestState.GONE,
        (RequestState.WAITING, RequestCause.FAILED): RequestState.GONE,
        (RequestState.RUNNING, RequestCause.PREEMPTED): RequestState.WAITING,
        (RequestState.RUNNING, RequestCause.PIPELINE_GONE): RequestState.WAITING,
        (RequestState.RUNNING, RequestCause.LAST_TOKEN): RequestState.CLOSING,
        (RequestState.RUNNING, RequestCause.STOP_STRING): RequestState.GONE,
        (RequestState.RUNNING, RequestCause.FAILED): RequestState.GONE,
        (RequestState.CLOSING, RequestCause.TEXT_SENT): RequestState.GONE,
        (RequestState.CLOSING, RequestCause.STOP_STRING): RequestState.GONE,
        (RequestState.CLOSING, RequestCause.FAILED): RequestState.GONE,
    },
)
