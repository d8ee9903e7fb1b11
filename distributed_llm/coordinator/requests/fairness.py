"""Whose request is next, and whose prompt is read: fair among clients. Pure.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., 2024): every
client has a counter of the tokens it was served, and the next request is one of the client with the
smallest counter. A client that comes back from idling starts where the least served of those that
wait stands, so that idling earns nothing. Within a client the oldest request is first.
"""

import heapq
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.requests.request import Request

_SLACK = 16
"""Entries of what is gone that a heap may hold beside as many as it has live ones."""

T = TypeVar("T")
_Key = tuple[float, int, int]
"""Counter, order of the first item, number of the client: smaller is next."""


@dataclass(eq=False)
class _Account(Generic[T]):
    """One client.

    Attributes:
        number: tells accounts apart.
        counter: tokens served, or as if.
        heap: its items by (order, serial); some of them may be removed already.
        size: items that are not.
        key: of its entry in the heap of accounts; None if it has none.
    """

    number: int
    counter: float = 0.0
    heap: list[tuple[int, int, T]] = field(default_factory=list)
    size: int = 0
    key: _Key | None = None


class FairQueue(Generic[T]):
    """Items of many clients that wait. Items are told apart by identity.

    An item's cost has to be charged when it is popped, at the latest before the next pop: as long
    as counters do not move, it is the same client's turn.

    All operations take O(log n), amortised: counters and orders mostly grow, so an entry of a heap
    is brought up to date when it comes to the top.
    """

    def __init__(self) -> None:
        self._accounts: dict[Hashable, _Account[T]] = {}
        self._heap: list[tuple[_Key, _Account[T]]] = []
        self._waiting: dict[int, tuple[_Account[T], int, T]] = {}  # by id; account, serial, item
        self._last: _Account[T] | None = None
        self._serials = count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        """Iterate over all items that wait, in no particular order."""
        return (item for _, _, item in self._waiting.values())

    def add(self, client: Hashable, item: T, *, order: int) -> None:
        """Queue `item`.

        Args:
            order: number of its arrival; one that is put back keeps its old one, and so comes
                before newer ones of its client.
        """
        assert id(item) not in self._waiting, "an item cannot wait twice"
        account = self._accounts.get(client)
        if account is None:
            account = self._accounts[client] = _Account(next(self._serials))
        if not account.size:
            account.counter = max(account.counter, self._level())
        serial = next(self._serials)
        heapq.heappush(account.heap, (order, serial, item))
        account.size += 1
        self._waiting[id(item)] = (account, serial, item)
        if account.key is None or self._key(account) < account.key:
            self._enter(account)

    def first(self) -> T | None:
        """Return the item that is next, or None if nothing waits."""
        account = self._next()
        return self._head(account)[2] if account else None

    def pop(self) -> T:
        """Take the item that is next.

        Raises:
            IndexError: nothing waits.
        """
        account = self._next()
        if account is None:
            raise IndexError("pop from an empty queue")
        item = self._head(account)[2]
        heapq.heappop(account.heap)
        self._left(account, item)
        return item

    def remove(self, client: Hashable, item: T) -> bool:
        """Take `item` out wherever it stands; return whether it waited."""
        account = self._accounts.get(client)
        if account is None or self._waiting.get(id(item), (None,))[0] is not account:
            return False
        self._left(account, item)
        return True

    def charge(self, client: Hashable, tokens: float) -> None:
        """Count service for `client`, whether something of it waits or not.

        Nothing is kept of a client that is not known (any more).
        """
        assert tokens >= 0
        if client in self._accounts:
            self._accounts[client].counter += tokens

    def forget(self, client: Hashable) -> None:
        """Forget the counter of a client that has nothing waiting or running any more."""
        account = self._accounts.pop(client, None)
        assert account is None or not account.size, "work of this client waits"
        self._shrink()

    # -------------------------------------------------------------- heaps

    def _level(self) -> float:
        """Return where a client starts: with the least served, or the last one that waited."""
        account = self._next() or self._last
        return account.counter if account else 0.0

    def _next(self) -> _Account[T] | None:
        """Return the account whose turn it is, with its entry on top of the heap."""
        while self._heap:
            key, account = self._heap[0]
            if account.key is not key:
                heapq.heappop(self._heap)
            elif not account.size:
                heapq.heappop(self._heap)
                account.key = None
            elif key != (current := self._key(account)):
                account.key = current
                heapq.heapreplace(self._heap, (current, account))
            else:
                return account
        return None

    def _enter(self, account: _Account[T]) -> None:
        """Give `account` an entry with its key; an older one is dead from now on."""
        account.key = self._key(account)
        heapq.heappush(self._heap, (account.key, account))
        self._shrink()

    def _shrink(self) -> None:
        """Drop dead entries if they are most of the heap."""
        if len(self._heap) > 2 * len(self._accounts) + _SLACK:
            known = self._accounts.values()
            self._heap = [(one.key, one) for one in known if one.key is not None]
            heapq.heapify(self._heap)

    def _key(self, account: _Account[T]) -> _Key:
        return account.counter, self._head(account)[0], account.number

    def _head(self, account: _Account[T]) -> tuple[int, int, T]:
        """Return the entry of the account's oldest item, on top of its heap."""
        while not self._waits(account.heap[0]):
            heapq.heappop(account.heap)
        return account.heap[0]

    def _waits(self, entry: tuple[int, int, T]) -> bool:
        _, serial, item = entry
        known = self._waiting.get(id(item))
        return known is not None and known[1] == serial

    def _left(self, account: _Account[T], item: T) -> None:
        """`item` waits no longer."""
        del self._waiting[id(item)]
        account.size -= 1
        if len(account.heap) > 2 * account.size + _SLACK:
            account.heap = [entry for entry in account.heap if self._waits(entry)]
            heapq.heapify(account.heap)
        if not account.size:
            account.heap.clear()
            self._last = account

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        sizes = [account.size for account in self._accounts.values()]
        assert sum(sizes) == len(self._waiting)
        assert len(self._heap) <= 2 * len(self._accounts) + _SLACK
        entries = {account.number: key for key, account in self._heap if account.key is key}
        for account in self._accounts.values():
            live = [entry for entry in account.heap if self._waits(entry)]
            assert len(live) == account.size
            assert len(account.heap) <= 2 * account.size + _SLACK
            assert (account.key is None) == (account.number not in entries)
            if live:
                assert entries[account.number] <= (account.counter, min(live)[0], account.number)


def shared_out(prompts: Iterable[Request], budget: int) -> Iterator[tuple[Request, int]]:
    """Yield how many tokens of each prompt to compute: the same for all clients that want as many.

    Within a client the oldest is first. What a client does not need is left to the others.
    """
    clients: dict[PeerId, list[Request]] = {}
    for request in prompts:
        clients.setdefault(request.ticket.key[0], []).append(request)
    wanted = {peer: sum(r.num_unscheduled_tokens for r in own) for peer, own in clients.items()}
    for at, peer in enumerate(sorted(clients, key=wanted.__getitem__)):
        share = -(-budget // (len(clients) - at))
        for request in clients[peer]:
            size = min(request.num_unscheduled_tokens, share)
            if size <= 0:
                break
            share -= size
            budget -= size
            yield request, size
