"""Runs the API: sockets, signals, and the server that speaks HTTP."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator

import uvicorn

from distributed_llm.api.app import make_app
from distributed_llm.api.callers import Callers
from distributed_llm.common.errors import AddressInUse
from distributed_llm.common.settings import ApiSettings, ClientSettings
from distributed_llm.common.stopping import exit_code, on_signal
from distributed_llm.common.units import split_address

_GRACE_S = 5
"""Time for requests that are under way when the API is told to end, seconds."""

_KEEP_ALIVE_S = 30

_MAX_HEADER_BYTES = 64 << 10


class _Server(uvicorn.Server):
    """A server that leaves signals to its program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do nothing."""
        yield


async def serve(
    settings: ApiSettings, asked: ClientSettings, *, on_listening: Callable[[str], None]
) -> int:
    """Serve the API until a signal; return the exit code.

    Args:
        settings: of the API.
        asked: which coordinator it asks, and how.
        on_listening: called with the URL once requests are accepted.

    Raises:
        AddressInUse: the address to listen on is taken or not of this machine.
    """
    listening = _listen(settings.bind)
    host, port = listening.getsockname()[:2]
    callers = Callers(
        asked.coordinator,
        insecure=asked.insecure,
        open_to_all=settings.open,
        connect_timeout_s=asked.connect_timeout_s,
    )
    server = _Server(
        uvicorn.Config(
            make_app(callers),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            http="h11",
            ws="none",
        )
    )
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if not stopped.done():
            stopped.set_result(exit_code(number))

    on_signal(stop)
    on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await server.serve(sockets=[listening])
    return stopped.result() if stopped.done() else 1


def _listen(bind: str) -> socket.socket:
    """Return a listening socket.

    Raises:
        AddressInUse: the address is taken or not of this machine.
    """
    host, port = split_address(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as exc:
        raise AddressInUse(
            f"The API cannot listen on {bind}: {exc.strerror}. Another program may use the port, "
            "or the address is of another machine. Choose another one: --bind HOST:PORT."
        ) from exc
