"""The states of an answer, and what leads from one to the next.

An answer waits until a pipeline has room for its prompt, and runs until its last token is known.
Then it is closing: only the text of its last tokens is missing. It goes back from running to
waiting when its KV cache is given up, and may fail in every state. A stop string is found in the
text, which comes later than the tokens, so the answer may be in any state by then; and so may one
whose grammar turns out to be complete.
"""

from enum import Enum, auto

from distributed_llm.common.states import StateTable


class AnswerState(Enum):
    """Where an answer is in its life.

    Attributes:
        WAITING: in the queue; no pipeline runs it, and it has no KV cache.
        RUNNING: a pipeline's scheduler runs it.
        CLOSING: all its tokens are known; the text of the last ones was not sent yet.
        GONE: it has ended, completely or with an error.
    """

    WAITING = auto()
    RUNNING = auto()
    CLOSING = auto()
    GONE = auto()


class AnswerCause(Enum):
    """What changes the state of an answer.

    Attributes:
        ADMITTED: a pipeline has room for it.
        PREEMPTED: its KV cache was given up for an older answer.
        PIPELINE_GONE: the pipeline it ran on was dissolved.
        LAST_TOKEN: its last token was sampled.
        TEXT_SENT: the text of all its tokens was sent.
        EMBEDDED: its embedding was sent; it was to have no tokens.
        STOP_STRING: a stop string was found in its text.
        GRAMMAR_COMPLETE: its grammar admits no further token.
        FAILED: its request ends with an error, was cancelled, or the client is gone.
    """

    ADMITTED = auto()
    PREEMPTED = auto()
    PIPELINE_GONE = auto()
    LAST_TOKEN = auto()
    TEXT_SENT = auto()
    EMBEDDED = auto()
    STOP_STRING = auto()
    GRAMMAR_COMPLETE = auto()
    FAILED = auto()


ANSWER_STATES = StateTable(
    "an answer",
    AnswerState.WAITING,
    {
        (AnswerState.WAITING, AnswerCause.ADMITTED): AnswerState.RUNNING,
        (AnswerState.WAITING, AnswerCause.STOP_STRING): AnswerState.GONE,
        (AnswerState.WAITING, AnswerCause.GRAMMAR_COMPLETE): AnswerState.GONE,
        (AnswerState.WAITING, AnswerCause.FAILED): AnswerState.GONE,
        (AnswerState.RUNNING, AnswerCause.PREEMPTED): AnswerState.WAITING,
        (AnswerState.RUNNING, AnswerCause.PIPELINE_GONE): AnswerState.WAITING,
        (AnswerState.RUNNING, AnswerCause.LAST_TOKEN): AnswerState.CLOSING,
        (AnswerState.RUNNING, AnswerCause.EMBEDDED): AnswerState.GONE,
        (AnswerState.RUNNING, AnswerCause.STOP_STRING): AnswerState.GONE,
        (AnswerState.RUNNING, AnswerCause.GRAMMAR_COMPLETE): AnswerState.GONE,
        (AnswerState.RUNNING, AnswerCause.FAILED): AnswerState.GONE,
        (AnswerState.CLOSING, AnswerCause.TEXT_SENT): AnswerState.GONE,
        (AnswerState.CLOSING, AnswerCause.STOP_STRING): AnswerState.GONE,
        (AnswerState.CLOSING, AnswerCause.GRAMMAR_COMPLETE): AnswerState.GONE,
        (AnswerState.CLOSING, AnswerCause.FAILED): AnswerState.GONE,
    },
)
