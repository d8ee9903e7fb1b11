"""Where the API of `dllm up` listens, and how this machine calls that."""

import contextlib
import socket

from distributed_llm.common.addresses import ip_of
from distributed_llm.common.settings import ApiSettings
from distributed_llm.common.units import split_address

_PORTS = 16
"""Ports that are tried, one after the other."""


def free_bind() -> str:
    """Return the first "HOST:PORT" on this machine, from the default on, on which nobody listens.

    If somebody listens on all of them, the default is returned; the API then says what is wrong.
    """
    default = ApiSettings().bind[0]
    host, first = split_address(default)
    for port in range(first, first + _PORTS):
        with contextlib.suppress(OSError):
            socket.create_server((host, port)).close()
            return f"{host}:{port}"
    return default


def url_from_here(url: str) -> str:
    """Return a URL of this machine's; all its networks are called by loopback."""
    scheme, _, address = url.partition("://")
    host, port = split_address(address)
    ip = ip_of(host)
    return f"{scheme}://127.0.0.1:{port}" if ip is not None and ip.is_unspecified else url
