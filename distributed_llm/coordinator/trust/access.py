"""Who may do what: every message is checked against the role of the key that it came from. Pure.

Without keys (`--insecure`) everybody may do everything, and nobody can enrol.
"""

from collections.abc import Callable
from typing import assert_never

from distributed_llm.common.errors import InvalidRequest, NotAllowed
from distributed_llm.common.keys import PublicKey, key_bytes
from distributed_llm.common.messages import (
    ClientHello,
    ClientRequest,
    ClusterMembers,
    CreateToken,
    DrainWorker,
    Enrol,
    GetMembers,
    MachineStatus,
    ReadmitMachine,
    RemoveMachine,
    RevokeToken,
    ToCoordinator,
    TokenStatus,
    WeightRequest,
    WorkerHello,
)
from distributed_llm.common.roles import Role
from distributed_llm.coordinator.trust.conduct import Conduct
from distributed_llm.coordinator.trust.members import Machine, Members

_ENROL_ONLY = NotAllowed("A token is good for enrolling a machine only: `dllm join`.")

ForAdmins = GetMembers | CreateToken | RevokeToken | RemoveMachine | ReadmitMachine
"""What concerns the members of the cluster."""


class Access:
    """Checks what peers may do, and changes who they are.

    Args:
        members: who may connect; None without keys.
        wall_clock: returns the seconds since 1970.

    Attributes:
        addresses: "HOST:PORT"s at which other machines reach the coordinator, best first.
        conduct: who broke the protocol, and may not connect for now.
    """

    def __init__(self, members: Members | None, wall_clock: Callable[[], float]) -> None:
        self._members = members
        self._wall_clock = wall_clock
        self.addresses: tuple[str, ...] = ()
        self.conduct = Conduct()

    @property
    def members(self) -> Members | None:
        """Who may connect; None without keys."""
        return self._members

    def fault(self, key: PublicKey, message: ToCoordinator | WeightRequest) -> NotAllowed | None:
        """Return why the holder of `key` may not send `message`; None if it may."""
        if self._members is None:
            return None
        machine = self._members.machine(key)
        if machine is None:
            return None if isinstance(message, Enrol) else _ENROL_ONLY
        if isinstance(message, Enrol):
            return NotAllowed(f"{machine.name} is enrolled already, and needs no token for that.")
        needed = role_for(message)
        if not machine.role.includes(needed):
            return NotAllowed(
                f"{machine.name} is enrolled as {machine.role.value}, and this takes "
                f"{needed.value}. Enrol it by another token: `dllm token create --role "
                f"{needed.value}`."
            )
        if isinstance(message, WorkerHello) and self.takes_name(key, message):
            return NotAllowed(
                f"The name {message.name} belongs to another machine. Give this worker "
                "another one with --name."
            )
        return None

    def identity(self, key: PublicKey) -> Machine | None:
        """Return the machine that holds `key`; None without keys, or if none does."""
        return self._members.machine(key) if self._members else None

    def takes_name(self, key: PublicKey, hello: WorkerHello) -> bool:
        """Return whether a hello has the name of a machine that does not hold `key`."""
        owner = self._members.owner_of(hello.name) if self._members else None
        return owner is not None and owner.key != key

    def offender(self, key: PublicKey) -> Machine | None:
        """Return the machine to quarantine for what the holder of `key` does, if it is one.

        No admin is: it could readmit itself, and the user who runs the coordinator has to be let
        in to see what is wrong. Nor is a token, which other machines need.
        """
        machine = self._members.machine(key) if self._members else None
        return None if machine is None or machine.role is Role.ADMIN else machine

    def names_of_others(self, key: PublicKey) -> frozenset[str]:
        """Return the names of the machines that do not hold `key`."""
        machines = self._members.machines if self._members else ()
        return frozenset(machine.name for machine in machines if machine.key != key)

    def enrol(self, key: PublicKey, message: Enrol) -> Machine:
        """Return the machine that the holder of a token enrols.

        Raises:
            DistributedLLMError: why it cannot be.
        """
        if self._members is None:
            raise InvalidRequest(
                "The coordinator was started with --insecure, so nobody enrols. Leave the token "
                "out, and give --insecure here as well."
            )
        _check_key(message.key)
        return self._members.enrol(key, message.key, message.name, now=self._wall_clock())

    def administer(self, key: PublicKey, message: ForAdmins) -> Machine | None:
        """Change who may connect; return the machine that may not any more, if it is one.

        Args:
            key: of the admin who asks.

        Raises:
            DistributedLLMError: why that cannot be done.
        """
        members, now = self._members, self._wall_clock()
        if members is None:
            raise InvalidRequest(
                "The coordinator was started with --insecure, so there are no tokens and machines."
            )
        match message:
            case GetMembers():
                return None
            case CreateToken(key=token_key, role=role, uses=uses, lifetime_s=lifetime_s):
                _check_key(token_key)
                members.create_token(token_key, role, uses=uses, lifetime_s=lifetime_s, now=now)
                return None
            case RevokeToken(token_id=token_id):
                members.revoke_token(token_id, now=now)
                return None
            case RemoveMachine(name=name):
                machine = members.owner_of(name)
                if machine is not None and machine.key == key:
                    raise InvalidRequest(
                        f"{name} is the machine that asks, and would lock itself out. Remove it "
                        "from another one that is admin, or stop the coordinator."
                    )
                removed = members.remove_machine(name)
                self.conduct.forget(removed.key)
                return removed
            case ReadmitMachine(name=name):
                machine = members.named(name)
                self.conduct.readmit(machine.key, machine.name)
                return None
            case _:
                assert_never(message)

    def quarantined(self, *, now: float) -> tuple[str, ...]:
        """Return the names of the machines that may not connect for now."""
        machines = self._members.machines if self._members else ()
        left_s = self.conduct.quarantined_s
        return tuple(one.name for one in machines if left_s(one.key, now=now) is not None)

    def report(self, sessions: Callable[[PublicKey], int], *, now: float) -> ClusterMembers:
        """Return who may connect.

        Args:
            sessions: returns how many connections the holder of a key has.
            now: clock seconds.
        """
        if self._members is None:
            return ClusterMembers(machines=(), tokens=())
        machines = tuple(
            MachineStatus(
                name=one.name,
                role=one.role,
                key=one.key,
                enrolled_at=one.enrolled_at,
                sessions=sessions(one.key),
                quarantined_s=self.conduct.quarantined_s(one.key, now=now),
            )
            for one in self._members.machines
        )
        tokens = tuple(
            TokenStatus(
                id=one.id,
                role=one.role,
                created_at=one.created_at,
                uses_left=one.uses_left,
                expires_at=one.expires_at,
            )
            for one in self._members.tokens(now=self._wall_clock())
        )
        return ClusterMembers(machines=machines, tokens=tokens, addresses=self.addresses)


def _check_key(key: PublicKey) -> None:
    try:
        key_bytes(key)
    except ValueError as exc:
        raise InvalidRequest(f"What should be a public key is none: {exc}.") from exc


def role_for(message: ToCoordinator | WeightRequest) -> Role:
    """Return the role that it takes to send a message."""
    if isinstance(message, DrainWorker | ForAdmins):
        return Role.ADMIN
    if isinstance(message, ClientHello | ClientRequest):
        return Role.CLIENT
    return Role.WORKER
