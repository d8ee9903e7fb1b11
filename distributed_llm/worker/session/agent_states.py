"""The states of a worker's session with the coordinator, and what leads from one to the next."""

from enum import Enum

from distributed_llm.common.states import StateTable


class AgentState(Enum):
    """How far a worker is with its session.

    Attributes:
        CONNECTING: not connected; messages that still arrive are of no session, and ignored.
        GREETING: connected, and has said hello; waits for the welcome.
        JOINED: in a session.
        LEAVING: in a session; serves until others have its layers.
        ENDED: has ended, and ignores every event.
    """

    CONNECTING = "connecting"
    GREETING = "greeting"
    JOINED = "joined"
    LEAVING = "leaving"
    ENDED = "ended"


class AgentCause(Enum):
    """What changes the state of a worker's session.

    Attributes:
        CONNECTED: the connection to the coordinator was made.
        WELCOMED: the coordinator accepted the hello.
        SESSION_LOST: the connection broke, the coordinator fell silent or ended the session.
        ASKED_TO_LEAVE: a signal came while it served; it asked the coordinator to let it leave.
        STOPPED: a signal, an error, or the coordinator's permission ends it.
    """

    CONNECTED = "connected"
    WELCOMED = "welcomed"
    SESSION_LOST = "session lost"
    ASKED_TO_LEAVE = "asked to leave"
    STOPPED = "stopped"


_S, _C = AgentState, AgentCause
AGENT_STATES = StateTable(
    "a worker's session",
    _S.CONNECTING,
    {
        (_S.CONNECTING, _C.CONNECTED): _S.GREETING,
        (_S.CONNECTING, _C.SESSION_LOST): _S.CONNECTING,  # the old connection closes as well
        (_S.GREETING, _C.CONNECTED): _S.GREETING,  # connected anew twice, for that reason
        (_S.GREETING, _C.WELCOMED): _S.JOINED,
        (_S.GREETING, _C.SESSION_LOST): _S.CONNECTING,
        (_S.JOINED, _C.SESSION_LOST): _S.CONNECTING,
        (_S.JOINED, _C.ASKED_TO_LEAVE): _S.LEAVING,
        (_S.LEAVING, _C.SESSION_LOST): _S.ENDED,
        (_S.CONNECTING, _C.STOPPED): _S.ENDED,
        (_S.GREETING, _C.STOPPED): _S.ENDED,
        (_S.JOINED, _C.STOPPED): _S.ENDED,
        (_S.LEAVING, _C.STOPPED): _S.ENDED,
    },
)
