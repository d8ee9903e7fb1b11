"""A simulated cluster whose peers hold keys, and peers that say what they are told to."""

from dataclasses import replace
from typing import Any

from distributed_llm.common import codec
from distributed_llm.common.keys import NOBODY, PublicKey, key_text
from distributed_llm.common.messages import (
    ClientHello,
    ClientWelcome,
    ClusterMembers,
    GetMembers,
    MembersReport,
    ToCoordinator,
)
from distributed_llm.common.roles import Role
from distributed_llm.coordinator import events
from distributed_llm.coordinator.trust.access import Access
from distributed_llm.coordinator.trust.members import Members, MembersState
from tests.unit.simulation import SETTINGS, World

NOW = 1_000_000.0


def key(number: int) -> PublicKey:
    return PublicKey(key_text(number.to_bytes(32, "big")))


class Raw:
    """A peer that says what it is told to, by a key."""

    def __init__(self, world: "KeyedWorld", held: PublicKey, *, is_worker: bool = False) -> None:
        self.world = world
        self.is_worker = is_worker
        self.heard: list[Any] = []
        world.held[self] = held
        self.link = world.connect(self, "raw")

    def receive(self, link: object, wire: list[Any]) -> None:
        reader = codec.to_worker if self.is_worker else codec.to_client
        self.heard.append(reader.decode(wire))

    def say(self, message: ToCoordinator, *frames: Any) -> Any:
        """Send a message; return what comes back within a second."""
        before = len(self.heard)
        self.world.send_up(self.link, message, frames)
        self.world.run(lambda: len(self.heard) > before, for_s=1.0)
        return self.heard[before][0] if len(self.heard) > before else None


class KeyedWorld(World):
    """A simulated cluster whose peers hold keys, and whose door hears members only."""

    def __init__(self, settings: Any = SETTINGS) -> None:
        self.time_of_day = NOW  # seconds since 1970, by the coordinator's clock
        self.held: dict[object, PublicKey] = {}
        self.members = Members(MembersState())
        self.kept: list[MembersState] = []
        super().__init__(settings, access=Access(self.members, wall_clock=lambda: self.time_of_day))
        self._numbers = iter(range(1, 1000))
        self.admin = Raw(self, self.enrolled("admin", Role.ADMIN))
        assert isinstance(self.admin.say(ClientHello()), ClientWelcome)

    def enrolled(self, name: str, role: Role) -> PublicKey:
        """Return the key of a new machine."""
        token, held = key(next(self._numbers)), key(next(self._numbers))
        self.members.create_token(token, role, uses=1, lifetime_s=60.0, now=NOW)
        self.members.enrol(token, held, name, now=NOW)
        return held

    def connect(self, owner: Any, name: str) -> Any:
        if owner not in self.held:
            machine = getattr(owner, "name", f"{name}-{len(self.held)}")
            role = Role.WORKER if hasattr(owner, "agent") or name != "client" else Role.CLIENT
            self.held[owner] = self.enrolled(machine, role)
        owner.key = self.held[owner]
        return super().connect(owner, name)

    def _do(self, event: events.Event) -> None:
        if isinstance(event, events.Received | events.Garbage):
            held = event.key if event.key != NOBODY else self.held[self._links[event.peer].owner]
            if not self.members.admits(held):
                return  # as `Router` does
            event = replace(event, key=held)
        super()._do(event)

    def _perform(self, actions: Any) -> None:
        actions = list(actions)
        self.kept += [one.state for one in actions if isinstance(one, events.KeepMembers)]
        super()._perform(actions)

    @property
    def turned_away(self) -> int:
        return self.core.status(now=self.now).rejected.get("not_allowed", 0)

    def report(self) -> ClusterMembers:
        """Return who may connect, as an admin is told."""
        assert isinstance(self.admin.say(GetMembers()), MembersReport)
        (frame,) = self.admin.heard[-1][1]
        return codec.decode_members(frame)


def among_thieves() -> KeyedWorld:
    """Return a cluster in which not all are honest."""
    world = KeyedWorld()
    world.checker.all_are_honest = False
    return world
