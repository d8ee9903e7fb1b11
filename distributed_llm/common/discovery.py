"""Coordinators on the local network: they announce where they listen, by multicast DNS.

Anybody on the network can announce anything, so this only tells where to look: who connects there
holds the coordinator to the key that is known from when this machine joined. It needs the package
zeroconf, an extra of this one, which runs in threads of its own.
"""

import importlib.util
import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distributed_llm.common.addresses import address_text, addresses_for_others, ip_of
from distributed_llm.common.units import split_address

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

logger = logging.getLogger(__name__)

SERVICE = "_dllm._tcp.local."
MAX_FOUND = 32
"""Announcements that are read at most in one search."""

HOW_TO_INSTALL = "pip install 'distributedllm[discovery]'"

_MAX_ADDRESSES = 8
_MAX_NAME = 255
_ADDRESSES_EVERY_S = 30.0
"""Time between two looks whether the addresses that are announced are still ours, seconds."""

_ASK_MS = 100
_CLOSE_S = 2.0
_KEY = re.compile(r"[0-9a-f]{4}(-[0-9a-f]{4}){3}")
_MACHINE = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Announced:
    """What somebody on the network says: that a coordinator listens there. It may be a lie.

    Attributes:
        machine: name of its machine.
        key: fingerprint of its key.
        addresses: "HOST:PORT"s.
    """

    machine: str
    key: str
    addresses: tuple[str, ...]


def can_search() -> bool:
    """Return whether zeroconf is installed."""
    return importlib.util.find_spec("zeroconf") is not None


def read_announcement(
    port: int | None, hosts: Iterable[str], properties: Mapping[bytes, bytes | None]
) -> Announced | None:
    """Return what the records of an announcement say; None if they are none of ours.

    Args:
        hosts: IP addresses.
        properties: of the TXT record.
    """
    machine, key = (_text(properties.get(name)) for name in (b"machine", b"key"))
    if not _MACHINE.fullmatch(machine) or not _KEY.fullmatch(key):
        return None
    if port is None or not 0 < port < 1 << 16:
        return None
    ips = (ip for host in hosts if (ip := ip_of(host)) is not None)
    usable = [ip for ip in ips if not (ip.is_multicast or ip.is_unspecified or ip.is_link_local)]
    if not usable:
        return None
    addresses = tuple(address_text(ip, port) for ip in usable[:_MAX_ADDRESSES])
    return Announced(machine, key, addresses)


def _text(value: bytes | None) -> str:
    """Return the text of a property; empty if it is absent, long or no ASCII."""
    if value is None or len(value) > _MAX_NAME or not value.isascii():
        return ""
    return value.decode("ascii")


class Names:
    """Names of announcements, each once, and no more of them than are read.

    Attributes:
        again: those to be read once more, for not all records had come, or others may come; they
            come last.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.again: deque[str] = deque()

    def add(self, name: str) -> None:
        """Add a name that somebody announced; may be called by another thread."""
        if len(name) <= _MAX_NAME and name not in self._seen and len(self._seen) < MAX_FOUND:
            self._seen.add(name)
            self._new.put(name)

    def next(self, timeout_s: float) -> str | None:
        """Return a new name, else one to be read again; None if there is none in time."""
        try:
            return self._new.get(timeout=timeout_s)
        except queue.Empty:
            return self.again.popleft() if self.again else None


def search(
    is_wanted: Callable[[Announced], bool], timeout_s: float, *, hosts: Iterable[str] | None = None
) -> list[Announced]:
    """Return the coordinators that announce themselves, until one is wanted or the time is over.

    Blocks. Returns nothing where zeroconf is not installed or no network can be asked.

    Args:
        hosts: addresses of this machine to ask from; all unless given.
    """
    try:
        from zeroconf import Error, ServiceBrowser, Zeroconf
    except ImportError:
        return []
    asked = _our_hosts() if hosts is None else list(hosts)
    if not asked:
        return []
    names = Names()

    def told(zeroconf: Zeroconf, service_type: str, name: str, state_change: object) -> None:
        names.add(name)

    _be_quiet()
    try:
        opened = Zeroconf(asked)
    except (OSError, Error) as exc:
        logger.debug("the network cannot be asked for coordinators: %s", exc)
        return []
    with opened:
        ServiceBrowser(opened, SERVICE, handlers=[told])
        return _collect(opened, names, is_wanted, time.monotonic() + timeout_s)


def _our_hosts() -> list[str]:
    """Return the addresses of this machine that are in a network."""
    return [split_address(address)[0] for address in addresses_for_others("[::]:1")]


def _be_quiet() -> None:
    """Keep zeroconf from writing tracebacks to stderr about networks that come and go."""
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)


def _collect(
    zeroconf: "Zeroconf",
    names: "Names",
    is_wanted: Callable[[Announced], bool],
    give_up_at: float,
) -> list[Announced]:
    from zeroconf import ServiceInfo

    found: list[Announced] = []
    while (left_s := give_up_at - time.monotonic()) > 0:
        name = names.next(min(left_s, _ASK_MS / 1000))
        if name is None:
            continue
        info = ServiceInfo(SERVICE, name)
        if not (info.load_from_cache(zeroconf) or info.request(zeroconf, _ASK_MS)):
            names.again.append(name)
            continue
        announced = _announced(info)
        if announced is None:
            continue
        names.again.append(name)  # its addresses may change meanwhile
        if announced not in found and len(found) < MAX_FOUND:
            found.append(announced)
            if is_wanted(announced):
                break
    return found


def _announced(info: "ServiceInfo") -> Announced | None:
    return read_announcement(info.port, info.parsed_addresses(), info.properties)


class Announcer:
    """Announces a coordinator on the local network, from a thread of its own, until it is closed.

    Does nothing where zeroconf is not installed, or no other machine can reach the coordinator.

    Args:
        bound: "HOST:PORT" that the coordinator listens on, the host an IP address.
        machine: name of this machine.
        key: fingerprint of the coordinator's key.
        addresses: returns the "HOST:PORT"s to announce, as of now.
        every_s: time between two looks at them.
    """

    def __init__(
        self,
        bound: str,
        machine: str,
        key: str,
        *,
        addresses: Callable[[str], tuple[str, ...]] = addresses_for_others,
        every_s: float = _ADDRESSES_EVERY_S,
    ) -> None:
        self._bound = bound
        self._machine = machine
        self._key = key
        self._addresses = addresses
        self._every_s = every_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the announcement back, and end; blocks for a moment."""
        self._closed.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        if not can_search():
            logger.debug("not announced on the network: zeroconf is not installed")
            return
        level = logging.WARNING
        while not self._closed.is_set():
            announced = Announced(self._machine, self._key, self._addresses(self._bound))
            try:
                self._announce(announced)
            except Exception as exc:  # whatever it is, the coordinator does without
                logger.log(level, "cannot be announced on the network: %s", exc or repr(exc))
                level = logging.DEBUG  # it is said once
                self._closed.wait(self._every_s)

    def _announce(self, announced: Announced) -> None:
        """Announce it until it is closed or the addresses are others."""
        from zeroconf import Zeroconf

        hosts = [split_address(address)[0] for address in announced.addresses]
        if not hosts:
            self._wait_for_others(announced)
            return
        _be_quiet()
        with Zeroconf(hosts) as zeroconf:
            zeroconf.register_service(service_of(announced))
            logger.debug("announced on the network at %s", announced.addresses[0])
            self._wait_for_others(announced)

    def _wait_for_others(self, announced: Announced) -> None:
        while not self._closed.wait(self._every_s):
            if self._addresses(self._bound) != announced.addresses:
                return


def service_of(announced: Announced) -> "ServiceInfo":
    """Return the records of an announcement."""
    from zeroconf import ServiceInfo

    places = [split_address(address) for address in announced.addresses]
    return ServiceInfo(
        SERVICE,
        f"{announced.machine[:40]} {announced.key}.{SERVICE}",
        port=places[0][1],
        parsed_addresses=[host for host, _ in places],
        properties={"machine": announced.machine, "key": announced.key},
        server=f"dllm-{announced.key}.local.",
    )
