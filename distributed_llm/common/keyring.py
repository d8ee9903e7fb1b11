"""The keys of this machine: for each coordinator that it knows, a file that only its user reads."""

import asyncio
import contextlib
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import platformdirs

from distributed_llm.common.addresses import interface_hosts, ip_of, listens
from distributed_llm.common.errors import ConfigError, CoordinatorUnreachable, NotEnrolled
from distributed_llm.common.keys import KeyPair, PublicKey, key_bytes
from distributed_llm.common.transport import Login, key_pair_of
from distributed_llm.common.units import split_address
from distributed_llm.common.wording import no_coordinator_text

STATE_VARIABLE = "DLLM_STATE"
"""Environment variable that names another state folder."""

KEY_VARIABLE = "DLLM_KEY"
"""Environment variable that may hold the keys for a coordinator of which there is no key file."""

_LOOK_EVERY_S = 0.1
"""Time between two looks for the key of a coordinator that does not run yet, seconds."""

_MAX_FILE_BYTES = 1 << 20
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a key file holds.

    Attributes:
        address: "HOST:PORT" at which the coordinator was found.
        server: the key that the coordinator has to hold.
        secret: of this machine.
        name: by which this machine is enrolled; empty on the coordinator's own.
    """

    address: str
    server: PublicKey
    secret: str
    name: str


@dataclass(frozen=True)
class Joined:
    """A coordinator that this machine has enrolled at.

    Attributes:
        address: "HOST:PORT" at which it was found.
        login: the keys of both ends.
    """

    address: str
    login: Login


def state_folder() -> Path:
    """Return where this user's keys are kept on this machine."""
    named = os.environ.get(STATE_VARIABLE)
    return Path(named) if named else platformdirs.user_state_path("distributed_llm")


class Keyring:
    """The keys that one user of this machine has for coordinators.

    Args:
        folder: state folder; made when the first key is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "keys"

    def login(self, address: str) -> Login:
        """Return the keys for the coordinator at "HOST:PORT".

        Raises:
            NotEnrolled: there are none.
            ConfigError: others can read the file, or it is damaged.
        """
        login = self.kept(address)
        if login is None:
            raise NotEnrolled(
                f"This machine has no key for the coordinator at {address}. Run `dllm token "
                "create` where the coordinator runs, and here the line that it prints; if it was "
                "started with --insecure, give --insecure here too."
            )
        return login

    def kept(self, address: str) -> Login | None:
        """Return the keys for the coordinator at "HOST:PORT"; None if there are none.

        Raises:
            ConfigError: others can read the file, or it is damaged.
        """
        kept = self._find(address)
        return Login(kept.server, key_pair_of(kept.secret)) if kept else None

    def name(self, address: str) -> str:
        """Return by which name this machine is enrolled at "HOST:PORT"; empty if it is not.

        Raises:
            ConfigError: others can read the file, or it is damaged.
        """
        kept = self._find(address)
        return kept.name if kept else ""

    def joined(self) -> list[Joined]:
        """Return the coordinators that this machine has enrolled at, the latest first.

        Raises:
            ConfigError: others can read a file, or it is damaged.
        """
        paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        kept = [one for path in reversed(paths) if (one := self._read(path)) and one.name]
        return [Joined(one.address, Login(one.server, key_pair_of(one.secret))) for one in kept]

    def _find(self, address: str) -> _KeyFile | None:
        found = (self._read(self.path(name)) for name in _names_of(address))
        return next((kept for kept in found if kept), None)

    def _read(self, path: Path) -> _KeyFile | None:
        if (data := read_secret_file(path)) is None:
            return None
        try:
            kept = msgspec.json.decode(data, type=_KeyFile)
            key_pair_of(kept.secret)
        except (msgspec.DecodeError, ValueError) as exc:
            raise ConfigError(
                f"{path} is no key file ({exc}). Delete it, and enrol this machine again: run "
                "`dllm token create` where the coordinator runs, and here the line that it prints."
            ) from exc
        return kept

    def save(self, address: str, server: PublicKey, keys: KeyPair, *, name: str = "") -> None:
        """Keep the keys for a coordinator, in place of earlier ones.

        Args:
            name: by which this machine is enrolled; empty on the coordinator's own.

        Raises:
            ConfigError: the file cannot be written.
        """
        kept = _KeyFile(address, server, keys.secret, name)
        write_secret_file(self.path(address), msgspec.json.encode(kept))

    def move(self, address: str, to: str) -> None:
        """Keep the keys for a coordinator under its new address.

        Raises:
            ConfigError: the file cannot be written.
        """
        if address != to and (kept := self._read(self.path(address))):
            moved = msgspec.structs.replace(kept, address=to)
            write_secret_file(self.path(to), msgspec.json.encode(moved))
            self.forget(address)

    def forget(self, address: str) -> None:
        """Delete the keys for a coordinator, if there are any."""
        with contextlib.suppress(OSError):
            self.path(address).unlink()

    def path(self, address: str) -> Path:
        """Return the file of the keys for a coordinator."""
        return self._folder / (re.sub(r"[^A-Za-z0-9.-]", "_", address) + ".json")


def here(port: int) -> str:
    """Return the address under which a coordinator's key is kept on its own machine."""
    return f"127.0.0.1:{port}"


def _names_of(address: str) -> tuple[str, ...]:
    """Return the addresses under which keys for `address` may be kept, best first."""
    host, port = split_address(address)
    ip = ip_of(host)
    is_here = host in ("localhost", socket.gethostname()) or (
        ip is not None and (ip.is_loopback or ip.is_unspecified or _is_ours(str(ip)))
    )
    return (address, here(port)) if is_here else (address,)


def _is_ours(ip: str) -> bool:
    return any(str(ip_of(host)) == ip for host in interface_hosts())


def read_secret_file(path: Path) -> bytes | None:
    """Return the bytes of a file that only its owner may read; None if there is no such file.

    Raises:
        ConfigError: others may read it, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if sys.platform != "win32" and mode & _OTHERS:
                raise ConfigError(
                    f"{path} holds a secret, and other users may read it (mode "
                    f"{stat.S_IMODE(mode):04o}). Make it yours alone: chmod 600 {path}"
                )
            return file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}.") from exc


def write_secret_file(path: Path, data: bytes) -> None:
    """Write a file that only this user may read; others see the old one or the new one whole.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)
        except BaseException:
            os.unlink(written)
            raise
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be written: {exc.strerror}. It holds keys; {STATE_VARIABLE} names "
            "another folder for them."
        ) from exc


FindLogin = Callable[[str, float | None], Awaitable[Login | None]]
"""Returns the keys for the coordinator at an address; until when it may wait for them."""


def key_of_text(text: str, where: str = "This") -> Login:
    """Return the keys that `text` holds: those of the coordinator and of this end, with a dot.

    Args:
        where: what holds the text, for people.

    Raises:
        ConfigError: it holds no keys.
    """
    server, _, secret = text.strip().partition(".")
    try:
        key_bytes(server)
        return Login(PublicKey(server), key_pair_of(secret))
    except ValueError:
        raise ConfigError(
            f"{where} is no key for a coordinator, or not all of one. `dllm join LINE --print-key` "
            f"prints one, for {KEY_VARIABLE}, and `dllm key create` one for a program."
        ) from None


def text_of_key(login: Login) -> str:
    """Return keys as text, which is a secret."""
    return f"{login.server}.{login.keys.secret}"


def enrolled_name(address: str) -> str:
    """Return by which name this machine is enrolled at "HOST:PORT"; empty if it is not.

    Raises:
        ConfigError: the key file is damaged, or others can read it.
    """
    return Keyring(state_folder()).name(address)


async def no_login(address: str, give_up_at: float | None) -> None:
    """Return no keys, for a coordinator that was started with --insecure."""


async def find_login(address: str, give_up_at: float | None) -> Login:
    """Return the keys of this user for the coordinator at "HOST:PORT".

    A coordinator leaves a key for its own machine when it starts, so while nothing listens at the
    address, it is waited for.

    Args:
        give_up_at: until when, by the clock of the event loop; None is as long as it takes.

    Raises:
        NotEnrolled: there are none, and something listens there.
        CoordinatorUnreachable: there are none, and nothing listens there.
        ConfigError: the key file is damaged, or others can read it.
    """
    loop = asyncio.get_running_loop()
    keyring = Keyring(state_folder())
    while True:
        try:
            return keyring.login(address)
        except NotEnrolled:
            if text := os.environ.get(KEY_VARIABLE):
                return key_of_text(text, f"What {KEY_VARIABLE} is set to")
            if await listens(address):
                await asyncio.sleep(_LOOK_EVERY_S)  # it may just have started, and is about to
                return keyring.login(address)
        if give_up_at is not None and loop.time() >= give_up_at:
            raise CoordinatorUnreachable(
                f"No coordinator at {address}: {no_coordinator_text(False)}. Check the address and "
                "port, and that `dllm coordinator` runs there with a --bind that this machine can "
                "reach. This machine has no key for a coordinator there either."
            )
        await asyncio.sleep(_LOOK_EVERY_S)
