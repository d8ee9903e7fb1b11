"""Options that all sockets have, and their endpoints."""

import zmq

from distributed_llm.common.tensors import MAX_FRAME_BYTES

LINGER_MS = 300
"""Time that a closed socket goes on sending what is queued, milliseconds."""

_HANDSHAKE_MS = 3000
"""Time that a new connection has for ZeroMQ's handshake, milliseconds."""

_HEARTBEAT_MS = 1000
"""Interval of ZeroMQ's own heartbeats, milliseconds."""

_HEARTBEAT_TIMEOUT_MS = 3000
"""Time without an answer to a heartbeat after which a connection is closed, milliseconds."""


def open_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    """Return a new socket of a kind such as `zmq.ROUTER`; its queues and frames are bounded."""
    socket = context.socket(kind)
    socket.maxmsgsize = MAX_FRAME_BYTES
    socket.sndhwm = socket.rcvhwm = 64
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 2000
    socket.backlog = 256
    socket.linger = LINGER_MS
    return socket


def tcp_endpoint(address: str, socket: "zmq.Socket[bytes]") -> str:
    """Return ZeroMQ's name of "HOST:PORT"; have the socket use IPv6 for such an address."""
    if address.startswith("["):
        socket.ipv6 = True
    host, _, port = address.rpartition(":")
    return f"tcp://{host}:{port if port != '0' else '*'}"
