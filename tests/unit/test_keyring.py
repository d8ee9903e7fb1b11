"""Key files: who can read them, under which address they are found, and what damages them."""

import asyncio
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from distributed_llm.common import keyring as keyring_module
from distributed_llm.common.errors import ConfigError, CoordinatorUnreachable, NotEnrolled
from distributed_llm.common.keyring import (
    KEY_VARIABLE,
    STATE_VARIABLE,
    Keyring,
    enrolled_name,
    find_login,
    here,
    key_of_text,
    read_secret_file,
    state_folder,
    text_of_key,
    write_secret_file,
)
from distributed_llm.common.transport import Login, new_key_pair

PORT = 5555
FAR = f"203.0.113.9:{PORT}"
OURS, SERVER = new_key_pair(), new_key_pair().public
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
not_root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere"
)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this user, which is not there yet."""
    folder = tmp_path / "of this user" / "state"
    monkeypatch.setenv(STATE_VARIABLE, str(folder))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return folder


@pytest.fixture
def keyring(state: Path) -> Keyring:
    assert state_folder() == state
    return Keyring(state)


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of something that listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


# ------------------------------------------------------------------ kept and found


def test_what_is_saved_is_found_and_can_be_forgotten(keyring: Keyring) -> None:
    keyring.save(FAR, SERVER, OURS, name="mac")
    assert keyring.login(FAR) == Login(SERVER, OURS)
    assert keyring.name(FAR) == enrolled_name(FAR) == "mac"
    other = new_key_pair()
    keyring.save(FAR, SERVER, other)
    assert keyring.login(FAR) == Login(SERVER, other)  # in place of the first
    keyring.forget(FAR)
    keyring.forget(FAR)
    assert keyring.kept(FAR) is None
    assert keyring.name(FAR) == ""


def test_nothing_kept_is_told_with_what_to_do(keyring: Keyring, state: Path) -> None:
    with pytest.raises(NotEnrolled) as caught:
        keyring.login(FAR)
    assert str(caught.value) == (
        f"This machine has no key for the coordinator at {FAR}. Run `dllm token create` where the "
        "coordinator runs, and here the line that it prints; if it was started with --insecure, "
        "give --insecure here too."
    )
    assert caught.value.exit_code == 3
    assert not state.exists()  # looking leaves nothing behind


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.2", "localhost", "[::1]", "0.0.0.0", "[::]", socket.gethostname()],
)
def test_this_machine_by_any_name_finds_its_own_coordinator(keyring: Keyring, host: str) -> None:
    keyring.save(here(PORT), SERVER, OURS)
    assert keyring.login(f"{host}:{PORT}") == Login(SERVER, OURS)
    assert keyring.kept(f"{host}:{PORT + 1}") is None


def test_this_machine_is_known_by_its_address_in_the_network(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring_module, "interface_hosts", lambda: ("192.0.2.7", "fe80::1%eth0"))
    keyring.save(here(PORT), SERVER, OURS)
    assert keyring.login(f"192.0.2.7:{PORT}") == Login(SERVER, OURS)


@pytest.mark.parametrize("host", ["203.0.113.9", "pc.example", "[2001:db8::9]", "localhost.evil"])
def test_another_machine_does_not_get_the_key_of_this_one(keyring: Keyring, host: str) -> None:
    keyring.save(here(PORT), SERVER, OURS)
    assert keyring.kept(f"{host}:{PORT}") is None


def test_a_key_for_the_address_itself_comes_first(keyring: Keyring) -> None:
    other = new_key_pair()
    keyring.save(here(PORT), SERVER, OURS)
    keyring.save(f"localhost:{PORT}", SERVER, other)  # by a tunnel, say
    assert keyring.login(f"localhost:{PORT}").keys == other
    assert keyring.login(here(PORT)).keys == OURS


@pytest.mark.parametrize("address", ["../../etc/passwd:1", "a/b:1", "[::1]:1", "C:\\x:1", "é:1"])
def test_no_address_leads_out_of_the_folder(keyring: Keyring, state: Path, address: str) -> None:
    path = keyring.path(address)
    assert path.parent == state / "keys"
    assert path.resolve().parent == path.parent.resolve()


def test_the_latest_coordinator_is_the_one_that_was_enrolled_at_last(keyring: Keyring) -> None:
    assert keyring.joined() == []
    for age, (address, name) in enumerate(
        [(here(PORT), ""), ("a.example:1", "mac"), ("b.example:1", "mac"), (here(PORT + 1), "")]
    ):
        keyring.save(address, SERVER, OURS, name=name)
        os.utime(keyring.path(address), (1000 + age, 1000 + age))
    found = [one.address for one in keyring.joined()]
    assert found == ["b.example:1", "a.example:1"], "those of its own it did not enrol at"


def test_a_coordinator_that_moved_is_known_at_its_new_address_only(keyring: Keyring) -> None:
    keyring.save("a.example:1", SERVER, OURS, name="mac")
    keyring.move("a.example:1", "b.example:2")
    assert [one.address for one in keyring.joined()] == ["b.example:2"]
    assert keyring.kept("a.example:1") is None
    assert keyring.login("b.example:2").keys == OURS
    assert keyring.name("b.example:2") == "mac"
    keyring.move("b.example:2", "b.example:2")
    assert keyring.name("b.example:2") == "mac"
    keyring.move("c.example:1", "d.example:2")
    assert keyring.kept("d.example:2") is None


# ------------------------------------------------------------------ the files


@posix
def test_only_its_user_may_read_the_file_and_the_folder(keyring: Keyring, state: Path) -> None:
    earlier = os.umask(0)
    try:
        keyring.save(FAR, SERVER, OURS)
    finally:
        os.umask(earlier)
    assert stat.S_IMODE(keyring.path(FAR).stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "keys").stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o610, 0o677])
def test_a_file_that_others_may_use_is_refused(keyring: Keyring, mode: int) -> None:
    keyring.save(FAR, SERVER, OURS)
    path = keyring.path(FAR)
    path.chmod(mode)
    for look in (keyring.login, keyring.kept, keyring.name):
        with pytest.raises(ConfigError) as caught:
            look(FAR)
        assert str(caught.value) == (
            f"{path} holds a secret, and other users may read it (mode {mode:04o}). Make it yours "
            f"alone: chmod 600 {path}"
        )
        assert caught.value.exit_code == 2
    path.chmod(0o600)
    assert keyring.login(FAR).keys == OURS


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"name"', b'"nom"'),
        lambda data: data.replace(OURS.secret.encode(), OURS.secret[:-1].encode()),
        lambda data: data.replace(SERVER.encode(), b"not a key"),
        lambda data: data.replace(OURS.secret.encode(), b"!" * 43),
    ],
    ids=["empty", "cut", "no JSON", "unknown field", "short secret", "no server", "no key"],
)
def test_a_damaged_file_is_refused(keyring: Keyring, change: object) -> None:
    keyring.save(FAR, SERVER, OURS)
    path = keyring.path(FAR)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"is no key file .*Delete it, and enrol") as caught:
        keyring.login(FAR)
    assert str(path) in str(caught.value)
    assert OURS.secret[:-1] not in str(caught.value)


def test_a_folder_in_place_of_the_file_is_told(keyring: Keyring) -> None:
    keyring.path(FAR).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        keyring.login(FAR)
    with pytest.raises(ConfigError, match="cannot be written"):
        keyring.save(FAR, SERVER, OURS)


@not_root
def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(
    keyring: Keyring, state: Path
) -> None:
    state.mkdir(parents=True)
    state.chmod(0o500)
    try:
        with pytest.raises(ConfigError) as caught:
            keyring.save(FAR, SERVER, OURS)
    finally:
        state.chmod(0o700)
    assert str(keyring.path(FAR)) in str(caught.value)
    assert f"Permission denied. It holds keys; {STATE_VARIABLE} names another folder" in str(
        caught.value
    )


def test_a_file_where_the_folder_should_be_is_told(keyring: Keyring, state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text("no folder")
    with pytest.raises(ConfigError, match=f"cannot be written.*{STATE_VARIABLE}"):
        keyring.save(FAR, SERVER, OURS)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_who_reads_while_it_is_written_sees_the_old_keys_or_the_new_ones(
    keyring: Keyring, state: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A write that fails half-way leaves the old file, and nothing beside it."""
    keyring.save(FAR, SERVER, OURS)

    def fail(*_: object) -> None:
        assert keyring.login(FAR).keys == OURS
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, fail)
        with pytest.raises(ConfigError, match="No space left on device"):
            keyring.save(FAR, SERVER, new_key_pair())
    assert keyring.login(FAR).keys == OURS
    assert list((state / "keys").iterdir()) == [keyring.path(FAR)]


@posix
def test_it_is_secret_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, modes = tmp_path / "new" / "file", []
    replace = os.replace

    def watched(written: str, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(written).st_mode))
        assert Path(written).parent == path.parent  # else it would be copied
        replace(written, target)

    monkeypatch.setattr(os, "replace", watched)
    write_secret_file(path, b"data")
    assert modes == [0o600]
    assert read_secret_file(path) == b"data"
    assert read_secret_file(tmp_path / "none") is None


# ------------------------------------------------------------------ keys as text


def test_keys_as_text_are_read_again() -> None:
    login = Login(SERVER, OURS)
    assert key_of_text(f" {text_of_key(login)}\n") == login


@pytest.mark.parametrize(
    "text",
    ["", ".", SERVER, f"{SERVER}.", f".{OURS.secret}", f"{SERVER}.{OURS.secret}x", "a.b", "é.é"],
    ids=range(8),  # keys are drawn, and pytest's processes have to agree
)
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match=f"no key for a coordinator.*{KEY_VARIABLE}") as caught:
        key_of_text(text)
    assert OURS.secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# ------------------------------------------------------------------ found while one waits


def test_a_key_in_the_environment_is_used_where_no_file_is(
    keyring: Keyring, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    login, other = Login(SERVER, OURS), Login(SERVER, new_key_pair())
    monkeypatch.setenv(KEY_VARIABLE, text_of_key(login))
    assert asyncio.run(find_login(FAR, 0.0)) == login
    keyring.save(FAR, SERVER, other.keys)
    assert asyncio.run(find_login(FAR, 0.0)) == other


def test_what_is_no_key_in_the_environment_is_told(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match=f"What {KEY_VARIABLE} is set to is no key"):
        asyncio.run(find_login(FAR, 0.0))


def test_no_key_for_a_coordinator_that_runs_is_told_at_once(
    keyring: Keyring, listener: str
) -> None:
    """However long one would wait for a coordinator: this will not mend itself."""
    with pytest.raises(NotEnrolled, match=f"no key for the coordinator at {listener}"):
        asyncio.run(find_login(listener, None))


def test_the_key_of_a_coordinator_that_starts_is_waited_for(keyring: Keyring) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

    async def start_while_one_waits() -> Login:
        waiting = asyncio.create_task(find_login(address, None))
        await asyncio.sleep(0)
        assert not waiting.done()
        keyring.save(address, SERVER, OURS)
        return await waiting

    assert asyncio.run(start_while_one_waits()) == Login(SERVER, OURS)


def test_the_wait_for_a_coordinator_ends(keyring: Keyring) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(CoordinatorUnreachable) as caught:
        asyncio.run(find_login(address, 0.0))
    assert str(caught.value).startswith(f"No coordinator at {address}: ")
    assert "This machine has no key for a coordinator there either." in str(caught.value)


@posix
def test_a_file_that_others_may_read_ends_the_wait(keyring: Keyring) -> None:
    keyring.save(FAR, SERVER, OURS)
    keyring.path(FAR).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        asyncio.run(find_login(FAR, None))


def test_the_file_holds_what_it_says(keyring: Keyring) -> None:
    keyring.save(FAR, SERVER, OURS, name="mac")
    assert msgspec.json.decode(keyring.path(FAR).read_bytes()) == {
        "address": FAR,
        "server": SERVER,
        "secret": OURS.secret,
        "name": "mac",
    }
