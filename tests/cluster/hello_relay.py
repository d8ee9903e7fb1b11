"""A relay between workers and their coordinator that changes where a worker says it is reached.

It stands for a network in which an address that a worker knows of itself leads elsewhere.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.common import codec
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import Addresses, WorkerHello
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer, Door, Router, new_key_pair
from distributed_llm.common.types import PeerId


class HelloRelay:
    """Where workers join instead; a context manager. It runs in a thread of its own.

    Messages are passed on as they are, but for the hello. Without keys for the coordinator, it has
    none either. Workers join the relay with the key that
    this machine has for the coordinator, and the relay joins that with the same one: workers would
    not let in each other otherwise.

    Args:
        coordinator: "HOST:PORT".
        advertise: returns the addresses that a hello shall name; called in the relay's thread.

    Attributes:
        address: "HOST:PORT" to join.
    """

    def __init__(self, coordinator: str, advertise: Callable[[WorkerHello], Addresses]) -> None:
        self._coordinator = coordinator
        self._advertise = advertise
        self._dealers: dict[PeerId, Dealer] = {}
        self.address = ""

    def __enter__(self) -> Self:
        self._thread = LoopThread()
        self._thread.run(self._open())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.run(self._close())
        self._thread.stop()

    async def _open(self) -> None:
        self._keyring = Keyring(state_folder())
        self._login = self._keyring.kept(self._coordinator)
        if self._login is None:
            self._router = Router("127.0.0.1:0", self._on_message, lambda: None, door=None)
            self.address = self._router.address
            return
        member, keys = self._login.keys, new_key_pair()
        door = Door(keys, lambda key: key == member.public)
        self._router = Router("127.0.0.1:0", self._on_message, lambda: None, door=door)
        self.address = self._router.address
        self._keyring.save(self.address, keys.public, member)

    async def _close(self) -> None:
        self._keyring.forget(self.address)
        self._router.close()
        for dealer in self._dealers.values():
            dealer.close()

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        if peer not in self._dealers:
            hello, _ = codec.to_coordinator.decode(frames)
            assert isinstance(hello, WorkerHello)
            frames = codec.encode(
                msgspec.structs.replace(hello, peer_addresses=self._advertise(hello))
            )
            self._dealers[peer] = Dealer(
                self._coordinator,
                lambda answer: self._pass_back(peer, answer),
                lambda: None,
                lambda: None,
                login=self._login,
                on_rejected=lambda _: None,
            )
        self._dealers[peer].send(frames)

    def _pass_back(self, peer: PeerId, frames: list[Frame]) -> None:
        self._router.send(peer, frames)
