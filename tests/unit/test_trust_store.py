"""A coordinator's keys on disk: kept over a restart, damaged, readable by others, of port 0."""

import stat
import sys
from pathlib import Path

import msgspec
import pytest

from distributed_llm.common.errors import ConfigError, NotEnrolled
from distributed_llm.common.keyring import Keyring, here
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import new_key_pair
from distributed_llm.coordinator.trust.store import OWNER, Trust

NOW = 1_000_000.0
PORT = 5555
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")


def file_of(folder: Path, port: int = PORT) -> Path:
    return folder / "coordinators" / f"{port}.json"


def test_keys_and_members_are_the_same_after_a_restart(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    token, pc = new_key_pair().public, new_key_pair().public
    trust.members.create_token(token, Role.WORKER, uses=2, lifetime_s=None, now=NOW)
    trust.members.enrol(token, pc, "pc", now=NOW + 1)
    trust.keep(trust.members.state)
    login = Keyring(tmp_path).login(here(PORT))
    trust.close()
    again = Trust(tmp_path, PORT, now=NOW + 99)
    assert again.keys == trust.keys
    assert again.members.state == trust.members.state
    assert Keyring(tmp_path).login(here(PORT)) == login
    assert again.door.keys == again.keys
    assert again.door.admits(pc)
    assert again.door.admits(token)
    assert not again.door.admits(new_key_pair().public)


def test_a_removed_machine_stays_removed_after_a_restart(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    token, pc = new_key_pair().public, new_key_pair().public
    trust.members.create_token(token, Role.WORKER, uses=1, lifetime_s=None, now=NOW)
    trust.members.enrol(token, pc, "pc", now=NOW)
    trust.keep(trust.members.state)
    trust.members.remove_machine("pc")
    trust.keep(trust.members.state)
    again = Trust(tmp_path, PORT, now=NOW)
    assert not again.door.admits(pc)
    assert [machine.name for machine in again.members.machines] == [OWNER]


def test_the_user_who_runs_it_is_its_admin(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    login = Keyring(tmp_path).login(f"localhost:{PORT}")
    assert login.server == trust.keys.public
    owner = trust.members.machine(login.keys.public)
    assert owner is not None
    assert (owner.name, owner.role) == (OWNER, Role.ADMIN)


def test_coordinators_of_two_ports_do_not_share_keys(tmp_path: Path) -> None:
    one, other = Trust(tmp_path, PORT, now=NOW), Trust(tmp_path, PORT + 1, now=NOW)
    assert one.keys != other.keys
    login = Keyring(tmp_path).login(here(PORT))
    assert one.door.admits(login.keys.public)
    assert not other.door.admits(login.keys.public)


@posix
def test_only_its_user_can_read_what_it_writes(tmp_path: Path) -> None:
    Trust(tmp_path / "state", PORT, now=NOW)
    folder = tmp_path / "state"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert file_of(folder) in files
    assert len(files) == 2
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@posix
def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    Trust(tmp_path, PORT, now=NOW)
    path = file_of(tmp_path)
    path.chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        Trust(tmp_path, PORT, now=NOW)
    assert str(caught.value) == (
        f"{path} holds a secret, and other users may read it (mode 0640). Make it yours alone: "
        f"chmod 600 {path}"
    )


def damaged(data: bytes) -> list[bytes]:
    fields = msgspec.json.decode(data)
    return [
        b"",
        b"{}",
        data[:-1],
        b"\xff" + data,
        msgspec.json.encode({**fields, "secret": "short"}),
        msgspec.json.encode({**fields, "owner_secret": fields["owner_secret"][:-1] + "!"}),
        msgspec.json.encode({**fields, "other": 1}),
        msgspec.json.encode({**fields, "members": {"machines": [{"name": "pc"}]}}),
    ]


@pytest.mark.parametrize("which", range(8))
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, which: int) -> None:
    """Drawing new keys would shut out all machines, and nobody would know why."""
    Trust(tmp_path, PORT, now=NOW)
    path = file_of(tmp_path)
    secrets = msgspec.json.decode(path.read_bytes())
    data = damaged(path.read_bytes())[which]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        Trust(tmp_path, PORT, now=NOW)
    assert str(path) in str(caught.value)
    assert "Restore it, or delete it: then all machines have to enrol again." in str(caught.value)
    for secret in (secrets["secret"], secrets["owner_secret"]):
        assert secret not in str(caught.value)
    assert path.read_bytes() == data


def test_a_port_of_its_own_choosing_keeps_nothing_after_its_end(tmp_path: Path) -> None:
    trust = Trust(tmp_path, 0, now=NOW)
    assert list(tmp_path.rglob("*")) == []
    trust.listening(40_000)
    keyring = Keyring(tmp_path)
    login = keyring.login("localhost:40000")
    assert trust.door.admits(login.keys.public)
    trust.keep(trust.members.state)
    successor = Trust(tmp_path, 40_000, now=NOW)  # as if it had been killed
    assert successor.keys == trust.keys
    assert successor.members.state == trust.members.state
    trust.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(NotEnrolled):
        keyring.login("localhost:40000")
    assert Trust(tmp_path, 0, now=NOW).keys != trust.keys


def test_a_port_that_was_chosen_keeps_its_key_at_the_end(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    trust.close()
    assert Keyring(tmp_path).login(here(PORT)).server == trust.keys.public


def test_no_secret_is_printed(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    shown = repr((trust.keys, trust.door, Keyring(tmp_path).login(here(PORT))))
    assert trust.keys.public in shown
    for secret in (trust.keys.secret, trust._owner.secret):
        assert secret not in shown


@posix
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, and no folder")
    with pytest.raises(ConfigError, match=r"cannot be (read|written).*"):
        Trust(tmp_path / "state", PORT, now=NOW)


def test_the_user_who_runs_it_is_let_in_again_after_a_restart(tmp_path: Path) -> None:
    trust = Trust(tmp_path, PORT, now=NOW)
    trust.members.remove_machine(OWNER)
    trust.keep(trust.members.state)
    (owner,) = Trust(tmp_path, PORT, now=NOW).members.machines
    assert (owner.name, owner.role) == (OWNER, Role.ADMIN)
    assert owner.key == Keyring(tmp_path).login(here(PORT)).keys.public
