"""Decides whose messages are handled, and changes who may connect. Pure.

A message is turned away if its peer sends too many, is quarantined, or has a key that is not meant
for it. Whoever breaks the protocol again and again loses its session; if it is a machine with a key
of its own, it is quarantined. What it served goes on elsewhere, as if it had been lost.
"""

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import (
    DistributedLLMError,
    NotAllowed,
    NotReady,
    RemoteProtocolError,
)
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    CreateToken,
    DecodeTokens,
    DrainWorker,
    Embed,
    EncodePrompt,
    Enrol,
    Enrolled,
    Generate,
    GetDigests,
    GetMembers,
    GetModel,
    MembersReport,
    ReadChunk,
    ReadmitMachine,
    RemoveMachine,
    RevokeToken,
    TaskFailed,
    TaskResult,
    ToCoordinator,
    WeightRequest,
    WorkerDrained,
    WorkerHello,
)
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Garbage, KeepMembers, Received, Send
from distributed_llm.coordinator.membership import Membership, refusal
from distributed_llm.coordinator.serving.event_log import EventKind
from distributed_llm.coordinator.serving.steps import FOREIGN_RESULT
from distributed_llm.coordinator.trust.access import Access, ForAdmins
from distributed_llm.coordinator.trust.conduct import MOST_FAULTS, WITHIN_S, Fault
from distributed_llm.coordinator.trust.pace import MOST_PER_S, Pace

_NOT_COUNTED = (
    Generate,
    Embed,
    EncodePrompt,
    DecodeTokens,
    Cancel,
    TaskResult,
    TaskFailed,
    ReadChunk,
)
"""Messages that may come as fast as a program likes; results of no use are counted later, and of
chunks of weights a peer may wait for a few only."""

_MOST_QUESTIONS_PER_S = 50
"""Questions about a model in a second on one connection; a worker asks two."""


class Gate:
    """Turns messages away, and ends what peers do that break the protocol."""

    def __init__(self, cluster: Cluster, access: Access, membership: Membership) -> None:
        self._registry = cluster.registry
        self._log = cluster.event_log
        self._access = access
        self._conduct = access.conduct
        self._membership = membership
        self._pace = Pace()

    # -------------------------------------------------------------- before a message is handled

    def turn_away(self, event: Received | Garbage, *, now: float) -> list[Action] | None:
        """Return what to do about a message that is not handled; None if it is to be."""
        peer, key = event.peer, event.key
        message = event.message if isinstance(event, Received) else None
        if not isinstance(message, _NOT_COUNTED):
            number = self._pace.count(peer, now=now)
            asks = isinstance(message, GetModel | GetDigests)
            most = _MOST_QUESTIONS_PER_S if asks else MOST_PER_S
            if number > most:
                return self._too_many(peer, key, now, is_first=number == most + 1)
        if self._conduct.quarantined_s(key, now=now) is not None:
            return self._keep_out(peer, key, message, now)
        if message is None or not (fault := self._access.fault(key, message)):
            return None
        actions = self._not_allowed(peer, message, fault)
        if isinstance(message, WorkerHello) and self._access.takes_name(key, message):
            actions += self.fault(peer, key, Fault.OTHER_NAME, now=now)
        return actions

    def _too_many(
        self, peer: PeerId, key: PublicKey, now: float, *, is_first: bool
    ) -> list[Action]:
        """Drop a message that is too many; the first one in a second is a fault."""
        self._log.rejected["too_many"] += 1
        return self.fault(peer, key, Fault.TOO_MANY, now=now) if is_first else []

    def _keep_out(
        self,
        peer: PeerId,
        key: PublicKey,
        message: ToCoordinator | WeightRequest | None,
        now: float,
    ) -> list[Action]:
        """Tell a machine that it is quarantined when it says hello; answer nothing else."""
        self._log.rejected["quarantined"] += 1
        machine = self._access.offender(key)
        if machine is None or not isinstance(message, WorkerHello | ClientHello):
            return []
        return [refusal(peer, self._conduct.error(key, machine.name, now=now))]

    def _not_allowed(
        self, peer: PeerId, message: ToCoordinator | WeightRequest, why: NotAllowed
    ) -> list[Action]:
        """Tell a peer why it may not do what it asks for; end its session if that is all of it."""
        self._log.rejected["not_allowed"] += 1
        match message:
            case DrainWorker(worker=worker):
                said = WorkerDrained(worker=worker, code=why.code, message=str(why))
                return [Send(peer, said)]
            case GetMembers() | CreateToken() | RevokeToken() | RemoveMachine() | ReadmitMachine():
                return [Send(peer, MembersReport(code=why.code, message=str(why)))]
            case _:
                return [refusal(peer, why)]

    # -------------------------------------------------------------- faults

    def out_of_turn(self, peer: PeerId, key: PublicKey, *, now: float) -> list[Action]:
        """Have a peer say hello that sent something else before, or whose session was ended.

        The latter does not know yet, so that is no fault of it.
        """
        self._log.rejected["bad_state"] += 1
        error = NotReady("The coordinator does not know this session. Connect again.")
        told = refusal(peer, error, "lost")
        if self._registry.has_left(peer):
            return [told]
        return [told, *self.fault(peer, key, Fault.OUT_OF_TURN, now=now)]

    def second_hello(self, peer: PeerId, key: PublicKey, *, now: float) -> list[Action]:
        """Ignore the hello of a peer that was welcomed before."""
        self._log.rejected["bad_state"] += 1
        return self.fault(peer, key, Fault.OUT_OF_TURN, now=now)

    def of_no_use(self, worker: Worker, reason: str, *, now: float) -> list[Action]:
        """Count a result that nobody waits for: late ones are no fault, unless there is no end.

        Args:
            reason: name of the counter to increase.
        """
        self._log.rejected[reason] += 1
        if reason == FOREIGN_RESULT:
            return self.fault(worker.peer, worker.key, Fault.NOT_GIVEN, now=now)
        number = self._pace.count(worker.peer, now=now)
        if number <= MOST_PER_S:
            return []
        return self._too_many(worker.peer, worker.key, now, is_first=number == MOST_PER_S + 1)

    def fault(self, peer: PeerId, key: PublicKey, fault: Fault, *, now: float) -> list[Action]:
        """Count a fault of a peer; if it is one too many, end its session and keep it out."""
        machine = self._access.offender(key)
        if not self._conduct.strike(machine.key if machine else peer, now=now):
            return []
        why = f"broke the protocol {MOST_FAULTS} times: it {fault.value}"
        if machine is None:
            return self._end_session(peer, why, fault, now) if self._registry.knows(peer) else []
        pause_s = self._conduct.quarantine(machine.key, fault, now=now)
        note = self._log.note(
            EventKind.QUARANTINED, machine=machine.name, pause_s=pause_s, why=fault.value
        )
        error = self._conduct.error(machine.key, machine.name, now=now)
        actions: list[Action] = [note]
        for each in dict.fromkeys([*self._registry.peers_with(machine.key), peer]):
            actions += [*self._membership.gone(each, why, now=now), refusal(each, error)]
        return actions

    def _end_session(self, peer: PeerId, why: str, fault: Fault, now: float) -> list[Action]:
        """End the session of a peer that has no key to quarantine; a worker may join anew."""
        error = RemoteProtocolError(
            fault.name.lower(),
            f"the coordinator ended this session: it broke the protocol {MOST_FAULTS} times in "
            f"{WITHIN_S:.0f} s, and the last time it {fault.value}. Install the same release of "
            "distributedllm on both machines.",
        )
        told = refusal(peer, error, "lost" if self._registry.worker(peer) else None)
        note = self._log.note(EventKind.SESSION_ENDED, why=fault.value)
        return [note, *self._membership.gone(peer, why, now=now), told]

    # -------------------------------------------------------------- who may connect

    def enrol(self, event: Received, message: Enrol) -> list[Action]:
        """Enrol the machine that a token lets in, or tell its holder why not."""
        try:
            machine = self._access.enrol(event.key, message)
        except DistributedLLMError as exc:
            return [refusal(event.peer, exc)]
        enrolled = Enrolled(name=machine.name, role=machine.role)
        note = self._log.note(EventKind.ENROLLED, machine=machine.name, role=machine.role.value)
        return [*self._keep_members(), Send(event.peer, enrolled), note]

    def administer(
        self, peer: PeerId, key: PublicKey, message: ForAdmins, *, now: float
    ) -> list[Action]:
        """Change who may connect, and tell the admin who may."""
        try:
            removed = self._access.administer(key, message)
        except DistributedLLMError as exc:
            return [Send(peer, MembersReport(code=exc.code, message=str(exc)))]
        others = self._membership.removed(removed, now=now) if removed else []
        if isinstance(message, ReadmitMachine):
            others.append(self._log.note(EventKind.READMITTED, machine=message.name))
        members = self._access.report(lambda held: len(self._registry.peers_with(held)), now=now)
        spec, frame = frame_of_bytes(encode_payload(members))
        kept = [] if isinstance(message, GetMembers) else self._keep_members()
        return [*kept, Send(peer, MembersReport(tensors=(spec,)), (frame,)), *others]

    def _keep_members(self) -> list[Action]:
        members = self._access.members
        return [KeepMembers(members.state)] if members else []

    # -------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        """Return when the next quarantine is over, clock seconds, or None."""
        return self._conduct.next_deadline()

    def on_timer(self, *, now: float) -> list[Action]:
        """Note whose quarantine is over."""
        served = (self._access.offender(key) for key in self._conduct.on_timer(now=now))
        return [
            self._log.note(EventKind.READMITTED, machine=machine.name)
            for machine in served
            if machine
        ]
