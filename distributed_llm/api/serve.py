"""Runs the API: sockets, signals, and the server that speaks HTTP."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Generator, Sequence

import uvicorn
from starlette.types import ASGIApp

from distributed_llm.api.app import make_app
from distributed_llm.api.callers import Callers
from distributed_llm.api.ending import Ending
from distributed_llm.api.guard.connections import Connection
from distributed_llm.api.operations.feed import Feed
from distributed_llm.api.watching import watch
from distributed_llm.common.errors import AddressInUse
from distributed_llm.common.file_limit import raise_file_limit
from distributed_llm.common.settings import ApiSettings, ClientSettings
from distributed_llm.common.stopping import exit_code, on_signal
from distributed_llm.common.units import split_address

_GRACE_S = 5
"""Time for requests that are under way when the API is told to end, seconds."""

_KEEP_ALIVE_S = 30

_MAX_HEADER_BYTES = 64 << 10


class Server(uvicorn.Server):
    """A server that leaves signals to its program.

    Args:
        app: what is served.
        grace_s: time for requests that are under way when it is told to end, seconds.
        connection: serves one connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        grace_s: int = _GRACE_S,
        connection: type[Connection] = Connection,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=grace_s,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                http=connection,
                ws="none",
                lifespan="on",
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do nothing."""
        yield

    def stop(self) -> None:
        """End once the requests under way have; the second time at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    settings: ApiSettings, asked: ClientSettings, *, on_listening: Callable[[Sequence[str]], None]
) -> int:
    """Serve the API until a signal; return the exit code.

    Args:
        settings: of the API.
        asked: which coordinator it asks, and how.
        on_listening: called with the URLs once connections are accepted.

    Raises:
        AddressInUse: an address to listen on is taken or not of this machine.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of what anybody may send
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(_listen(bind)) for bind in settings.bind]
        callers = Callers(
            asked.coordinator,
            insecure=asked.insecure,
            open_to_all=settings.open,
            connect_timeout_s=asked.connect_timeout_s,
        )
        feed, ending = Feed(), Ending()
        server = Server(make_app(callers, settings, feed, ending))
        code = 1

        def stop(number: int) -> None:
            nonlocal code
            code = exit_code(number)
            ending.begun = True
            feed.end()  # else those who follow it would be waited for
            server.stop()

        on_signal(stop)
        watching = asyncio.get_running_loop().create_task(watch(callers.own, asked.coordinator))
        on_listening([_url(one) for one in listening])
        try:
            await server.serve(sockets=listening)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return code


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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
