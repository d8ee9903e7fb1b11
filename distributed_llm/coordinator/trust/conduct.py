"""Counts the faults of peers against the protocol, and quarantines machines for them. Pure.

Nothing that a program of this release does is a fault: not what comes late, after a plan or from a
session that was ended. So a machine that commits several has another release, or is broken, or
hostile. It is quarantined for some minutes, and for twice as long each time, until it has behaved
for a day. Nothing of this outlives the process.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from distributed_llm.common.errors import InvalidRequest, Quarantined
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.states import StateTable
from distributed_llm.common.types import PeerId
from distributed_llm.common.wording import duration_text
from distributed_llm.coordinator.trust.pace import MOST_PER_S

MOST_FAULTS = 5
"""Faults within `WITHIN_S` after which a peer is not heard any more."""

WITHIN_S = 60.0

FIRST_QUARANTINE_S = 300.0
_MOST_QUARANTINE_S = 6 * 3600.0
_PROBATION_S = 86_400.0

_MOST_OFFENDERS = 4096
"""Peers whose faults are counted at a time; the one that was noticed first makes room."""


class Fault(Enum):
    """What a peer did against the protocol; the values continue "it ...".

    Attributes:
        UNREADABLE: bytes that are no message of its direction.
        OUT_OF_TURN: a second hello, or anything else before the first one.
        OTHER_NAME: a hello with the name of another machine.
        NOT_GIVEN: a result of a step that was never begun, or that another stage runs.
        TOO_MANY: more than a program of this package sends.
    """

    UNREADABLE = "sent what cannot be read"
    OUT_OF_TURN = "sent what does not follow on what it had sent before"
    OTHER_NAME = "took the name of another machine"
    NOT_GIVEN = "sent the result of a step that it was not given"
    TOO_MANY = f"sent more than {MOST_PER_S:,} messages in a second"


class ConductState(Enum):
    """What the coordinator thinks of a machine.

    Attributes:
        TRUSTED: it may connect.
        QUARANTINED: it broke the protocol too often: it is refused until some time has passed.
        ON_PROBATION: it may connect, and the next quarantine will be longer.
    """

    TRUSTED = "trusted"
    QUARANTINED = "quarantined"
    ON_PROBATION = "on probation"


class ConductCause(Enum):
    """What changes that.

    Attributes:
        STRUCK_OUT: it has broken the protocol too often.
        TIME_SERVED: the quarantine is over.
        BEHAVED: so is the probation.
        READMITTED: an admin says that it is all right.
    """

    STRUCK_OUT = "struck out"
    TIME_SERVED = "time served"
    BEHAVED = "behaved"
    READMITTED = "readmitted"


_S, _C = ConductState, ConductCause
CONDUCT_STATES = StateTable(
    "a machine as the coordinator trusts it",
    _S.TRUSTED,
    {
        (_S.TRUSTED, _C.STRUCK_OUT): _S.QUARANTINED,
        (_S.QUARANTINED, _C.TIME_SERVED): _S.ON_PROBATION,
        (_S.QUARANTINED, _C.READMITTED): _S.TRUSTED,
        (_S.ON_PROBATION, _C.STRUCK_OUT): _S.QUARANTINED,
        (_S.ON_PROBATION, _C.BEHAVED): _S.TRUSTED,
    },
)


_SEE = "See what sends that, and install the same release of distributedllm on all machines"
_WHAT_TO_DO = {Fault.OTHER_NAME: "Give this worker a name of its own with --name"}
"""By the latest fault; `_SEE` about the others."""


@dataclass
class _Record:
    """A machine that was quarantined.

    Attributes:
        times: how often, lately.
        until: when the quarantine ends, or the probation, clock seconds.
        last: the latest fault.
    """

    state: ConductState = field(default=CONDUCT_STATES.initial)
    times: int = 0
    until: float = 0.0
    last: Fault = Fault.UNREADABLE

    def change(self, cause: ConductCause) -> None:
        self.state = CONDUCT_STATES.after(self.state, cause)


class Conduct:
    """Counts faults, and knows who is quarantined. All times are clock seconds."""

    def __init__(self) -> None:
        self._faults: dict[PublicKey | PeerId, deque[float]] = {}
        self._records: dict[PublicKey, _Record] = {}  # of machines that are not trusted
        self._due_at: float | None = None

    def strike(self, offender: PublicKey | PeerId, *, now: float) -> bool:
        """Count a fault; return whether it is one too many, after which the count begins anew.

        Args:
            offender: the machine, or the connection of a peer that is none.
        """
        times = self._faults.get(offender)
        if times is None:
            if len(self._faults) >= _MOST_OFFENDERS:
                del self._faults[next(iter(self._faults))]
            times = self._faults[offender] = deque(maxlen=MOST_FAULTS)
        times.append(now)
        if len(times) < MOST_FAULTS or times[0] <= now - WITHIN_S:
            return False
        del self._faults[offender]
        return True

    def quarantine(self, key: PublicKey, last: Fault, *, now: float) -> float:
        """Keep a machine out; return for how long, seconds."""
        record = self._records.setdefault(key, _Record())
        record.change(_C.STRUCK_OUT)
        pause_s = min(FIRST_QUARANTINE_S * 2.0**record.times, _MOST_QUARANTINE_S)
        record.times = min(record.times + 1, 64)
        record.until, record.last = now + pause_s, last
        self._set_timer()
        return pause_s

    def quarantined_s(self, key: PublicKey, *, now: float) -> float | None:
        """Return for how long a machine is still quarantined, seconds; None if it is not."""
        record = self._records.get(key)
        if record is None or record.state is not _S.QUARANTINED:
            return None
        return max(0.0, record.until - now)

    def error(self, key: PublicKey, name: str, *, now: float) -> Quarantined:
        """Return what a machine is told that is quarantined.

        Args:
            name: of the machine.
        """
        record = self._records[key]
        left = duration_text(max(1.0, record.until - now))
        what_to_do = _WHAT_TO_DO.get(record.last, _SEE)
        return Quarantined(
            f"{name} is quarantined: it broke the protocol {MOST_FAULTS} times in "
            f"{WITHIN_S:.0f} s; last it {record.last.value}. It may connect again in {left}. "
            f"{what_to_do}; an admin ends the quarantine earlier with `dllm machines readmit "
            f"{name}`."
        )

    def readmit(self, key: PublicKey, name: str) -> None:
        """End a quarantine, and forget that there was one.

        Raises:
            InvalidRequest: there is none.
        """
        record = self._records.get(key)
        if record is None or record.state is not _S.QUARANTINED:
            raise InvalidRequest(f"{name} is not quarantined: it may connect.")
        record.change(_C.READMITTED)
        self.forget(key)

    def forget(self, key: PublicKey) -> None:
        """Forget a machine that was removed, or readmitted."""
        self._faults.pop(key, None)
        self._records.pop(key, None)
        self._set_timer()

    def next_deadline(self) -> float | None:
        """Return when the next quarantine or probation is over, clock seconds, or None."""
        return self._due_at

    def on_timer(self, *, now: float) -> list[PublicKey]:
        """Return the machines whose quarantine is over."""
        if self._due_at is None or self._due_at > now:
            return []
        served = []
        for key, record in list(self._records.items()):
            if record.until > now:
                continue
            if record.state is _S.QUARANTINED:
                record.change(_C.TIME_SERVED)
                record.until = now + _PROBATION_S
                served.append(key)
            else:
                record.change(_C.BEHAVED)
                del self._records[key]
        self._set_timer()
        return served

    def _set_timer(self) -> None:
        self._due_at = min((record.until for record in self._records.values()), default=None)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert len(self._faults) <= _MOST_OFFENDERS
        assert all(record.state is not _S.TRUSTED for record in self._records.values())
