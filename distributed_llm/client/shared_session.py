"""The session that all calls of a client share: opened by the first one, and anew once it is lost.

Calls that wait for the same try to connect share what becomes of it. A try that was given up is
nobody's failure: the next call that waits makes one of its own.
"""

import asyncio

from distributed_llm.client.session import Session
from distributed_llm.common.errors import CoordinatorLost, DistributedLLMError
from distributed_llm.common.keyring import FindLogin


class SharedSession:
    """A session with one coordinator, opened whenever there is none.

    Args:
        address: "HOST:PORT" of the coordinator.
        find_login: finds the keys of both ends.
        timeout_s: how long to wait for a coordinator to answer at the address.
    """

    def __init__(self, address: str, find_login: FindLogin, timeout_s: float) -> None:
        self._address = address
        self._find_login = find_login
        self._timeout_s = timeout_s
        self._session: Session | None = None
        self._connecting = asyncio.Lock()
        self._tries = 0  # to connect
        self._why_not: DistributedLLMError | None = None  # what became of the last one

    async def get(self) -> Session:
        """Return the session; open it if there is none, or if it is over.

        Raises:
            CoordinatorLost: it was opened in another event loop or process.
            DistributedLLMError: as `Session.open` does.
        """
        if self._session and not self._session.is_here():
            raise CoordinatorLost(
                "This client is connected from another event loop, or from the process that this "
                "one was forked from. Make a new client here."
            )
        tries = self._tries
        async with self._connecting:
            if self._session and self._session.error:
                self._session.close()
                self._session = None
            if self._session is None:
                if self._why_not and self._tries > tries:
                    raise self._why_not  # else all who waited would try one after the other
                self._session = await self._open()
            return self._session

    async def _open(self) -> Session:
        self._why_not = None
        try:
            return await Session.open(self._address, self._find_login, self._timeout_s)
        except DistributedLLMError as exc:
            self._why_not = exc
            raise
        finally:
            self._tries += 1

    def close(self) -> None:
        """End the session, which cancels its requests; the next `get` opens another one."""
        if self._session and self._session.is_here():  # else it is for others to close
            self._session.close()
        self._session = None
