"""Addresses and names of machines: how they are written, which of ours others may use."""

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

import psutil

from distributed_llm.common.errors import CoordinatorUnreachable
from distributed_llm.common.units import split_address

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_ADDRESSES = 16
"""Addresses of one host that are used at most."""

_LISTENS_S = 2.0
"""Time within which whatever listens at an address accepts a connection, seconds."""

_ELSEWHERE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Addresses of no machine (RFC 5737, 3849), to ask which of ours would send to them."""


def ip_of(host: str) -> IPAddress | None:
    """Return the IP address that `host` spells; None if it is a name."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def address_text(ip: IPAddress, port: int) -> str:
    """Return "HOST:PORT", an IPv6 address in brackets."""
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def hosts_for_others(bound: IPAddress, first: Iterable[str]) -> list[IPAddress]:
    """Return the addresses of this machine at which others reach a socket bound to `bound`.

    Args:
        bound: an address of this machine, or that of all its networks.
        first: those that come first, in their order; then come the addresses of all networks, and
            loopback last, for programs on this machine.
    """
    if not bound.is_unspecified:
        return [bound]
    here = [ip for text in interface_hosts() if (ip := ip_of(text)) is not None]
    here.sort(key=lambda one: (one.is_loopback, one.version))
    known = [ip for text in first if (ip := ip_of(text)) is not None and not ip.is_loopback]
    return [one for one in dict.fromkeys([*known, *here]) if _serves(bound, one)]


def addresses_for_others(bound: str) -> tuple[str, ...]:
    """Return the "HOST:PORT"s at which other machines reach a socket, best first; maybe none.

    Args:
        bound: "HOST:PORT" that the socket listens on, the host an IP address.
    """
    host, port = split_address(bound)
    hosts = hosts_for_others(ipaddress.ip_address(host), outward_hosts())
    found = (address_text(one, port) for one in hosts if not one.is_loopback)
    return tuple(found)[:_MAX_ADDRESSES]


def machine_name() -> str:
    """Return this machine's name, reduced to the characters that names of workers may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname().split(".")[0])
    return name.lstrip("._-")[:60] or "worker"


def interface_hosts() -> list[str]:
    """Return the addresses of all network interfaces of this machine, of all kinds."""
    return [one.address for interface in psutil.net_if_addrs().values() for one in interface]


def has_ipv6() -> bool:
    """Return whether a network interface of this machine has an IPv6 address."""
    return any(ip.version == 6 for text in interface_hosts() if (ip := ip_of(text)) is not None)


def outward_hosts() -> list[str]:
    """Return the addresses from which this machine would send to other networks; sends nothing."""
    hosts = []
    for elsewhere, family in _ELSEWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            hosts.append(str(probe.getsockname()[0]))
    return hosts


def is_name(address: str) -> bool:
    """Return whether the host of "HOST:PORT" is a name, so that its addresses may change."""
    return ip_of(split_address(address)[0]) is None


async def addresses_of(address: str) -> tuple[str, ...]:
    """Return the "HOST:PORT"s with IP addresses that `address` stands for, best first.

    Raises:
        CoordinatorUnreachable: its name is not known.
    """
    if not is_name(address):
        return (address,)
    host, port = split_address(address)
    try:
        found = await _looked_up(host, port)
    except (OSError, UnicodeError) as exc:  # the latter: a label above 63 characters
        raise _unknown(host, address, str(exc)) from exc
    hosts = (ip_of(str(where[0])) for *_, where in found)
    texts = dict.fromkeys(address_text(ip, port) for ip in hosts if ip is not None)
    if not texts:
        raise _unknown(host, address, "it has no IP address")
    return tuple(texts)[:_MAX_ADDRESSES]


async def _looked_up(host: str, port: int) -> list[Any]:
    """Return what the system knows of a name, as `socket.getaddrinfo`.

    It may take half a minute where no name server answers. A thread of the event loop's own would
    have to end before the program does, so a program that was told to end would go on so long.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Any]] = loop.create_future()

    def tell(set_it: Callable[[Any], None], value: object) -> None:
        if not found.done():
            set_it(value)

    def look_up() -> None:
        try:
            told = found.set_result, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            told = found.set_exception, exc  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            loop.call_soon_threadsafe(tell, *told)

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    return await found


async def listens(address: str) -> bool:
    """Return whether something accepts connections at "HOST:PORT" within a moment."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_LISTENS_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _unknown(host: str, address: str, why: str) -> CoordinatorUnreachable:
    return CoordinatorUnreachable(
        f"The name {host!r} of {address} is not known here ({why}). Check its spelling, or give "
        "the IP address of that machine."
    )


def _serves(bound: IPAddress, host: IPAddress) -> bool:
    """Return whether others may use `host` for a socket bound to all addresses like `bound`."""
    if host.is_link_local or host.is_multicast or host.is_unspecified:
        return False
    return bound.version == 6 or host.version == 4
