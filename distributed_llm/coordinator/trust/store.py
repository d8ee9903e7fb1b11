"""The coordinator's keys and members on disk, for the same machines to connect to the next process.

Those of a coordinator that listens on a port of its own choosing (port 0) are deleted when it ends:
it will not be found there again. One that is killed leaves them for a successor on that port.
"""

from pathlib import Path

import msgspec

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.keyring import Keyring, here, read_secret_file, write_secret_file
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import Door, key_pair_of, new_key_pair
from distributed_llm.coordinator.trust.members import Machine, Members, MembersState

OWNER = "owner"
"""Name of the machine that stands for the user who runs the coordinator, on its own machine."""


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file of a coordinator holds.

    Attributes:
        secret: of the coordinator.
        owner_secret: of the user who runs it.
    """

    secret: str
    owner_secret: str
    members: MembersState


class Trust:
    """The keys of a coordinator, and who may connect to it.

    Args:
        folder: state folder of the user who runs it.
        port: that it listens on; 0 for one that is not known yet.
        now: seconds since 1970.

    Attributes:
        keys: of the coordinator.
        members: who may connect.
        door: lets the members in.

    Raises:
        ConfigError: the file is damaged, others can read it, or it cannot be written.
    """

    def __init__(self, folder: Path, port: int, *, now: float) -> None:
        self._keyring = Keyring(folder)
        self._folder = folder / "coordinators"
        self._path = self._folder / f"{port}.json" if port else None
        self._lasting = bool(port)
        self._port = port
        kept = self._read()
        self.keys = key_pair_of(kept.secret) if kept else new_key_pair()
        self._owner = key_pair_of(kept.owner_secret) if kept else new_key_pair()
        owner = Machine(OWNER, self._owner.public, Role.ADMIN, enrolled_at=now)
        members = kept.members if kept else MembersState()
        if all(one.key != owner.key for one in members.machines):  # who runs it is never locked out
            members = msgspec.structs.replace(members, machines=(owner, *members.machines))
        self.members = Members(members)
        self.door = Door(self.keys, self.members.admits)
        self.keep(self.members.state)
        if port:
            self.listening(port)  # whoever finds the port open finds the key

    def keep(self, state: MembersState) -> None:
        """Write who may connect, for the next process.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self._path:
            kept = _Kept(self.keys.secret, self._owner.secret, state)
            write_secret_file(self._path, msgspec.json.encode(kept))

    def listening(self, port: int) -> None:
        """Let the user who runs the coordinator connect to it from its machine.

        Raises:
            ConfigError: the key cannot be written.
        """
        self._port = port
        if self._path is None:  # a successor on this port lets in the same machines
            self._path = self._folder / f"{port}.json"
            self.keep(self.members.state)
        self._keyring.save(here(port), self.keys.public, self._owner)

    def close(self) -> None:
        """Forget the keys of a coordinator that listened on a port of its own choosing."""
        if not self._lasting and self._path:
            self._keyring.forget(here(self._port))
            self._path.unlink(missing_ok=True)

    def _read(self) -> _Kept | None:
        if self._path is None or (data := read_secret_file(self._path)) is None:
            return None
        try:
            kept = msgspec.json.decode(data, type=_Kept)
            key_pair_of(kept.secret)
            key_pair_of(kept.owner_secret)
        except (msgspec.DecodeError, ValueError) as exc:
            raise ConfigError(
                f"{self._path} is damaged ({exc}). It holds the keys of this coordinator. Restore "
                "it, or delete it: then all machines have to enrol again."
            ) from exc
        return kept
