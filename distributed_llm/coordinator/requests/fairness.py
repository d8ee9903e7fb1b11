"""Fairness among clients: whose answer runs next, and whose prompt is computed. Pure.

`FairQueue` is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et
al., 2024): every client has a counter of the tokens it was served, and the client with the smallest
counter is next. A client that comes back from idling starts at the counter of the least served
client that waits, so that idling earns nothing. Within a client the oldest answer is first.
"""

from bisect import insort
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, TypeVar

from distributed_llm.coordinator.requests.request import Answer

T = TypeVar("T")


@dataclass(eq=False)
class _Account(Generic[T]):
    """The service of one client, and its waiting items.

    Attributes:
        counter: tokens the client was served, or is treated as having been served.
        items: its waiting items as (order, item), oldest first.
    """

    client: Hashable
    counter: float = 0.0
    items: list[tuple[int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Waiting items of many clients. Items are told apart by identity.

    Charge the cost of an item between popping it and the next pop: as long as no counter moves, the
    same client is next again.
    """

    def __init__(self) -> None:
        self._accounts: dict[Hashable, _Account[T]] = {}
        self._waiting: dict[Hashable, _Account[T]] = {}  # accounts with items
        self._last_waiting: _Account[T] | None = None  # the last one to run out of items

    def __len__(self) -> int:
        return sum(len(account.items) for account in self._waiting.values())

    def __iter__(self) -> Iterator[T]:
        """Iterate over all waiting items, in no particular order."""
        return (item for account in self._waiting.values() for _, item in account.items)

    @property
    def clients(self) -> set[Hashable]:
        """Clients that have a counter."""
        return set(self._accounts)

    def add(self, client: Hashable, item: T, *, order: int) -> None:
        """Queue `item`.

        Args:
            order: number of its arrival. An item that is put back keeps its number, and so comes
                before newer ones of its client.
        """
        account = self._accounts.setdefault(client, _Account(client))
        if not account.items:
            account.counter = max(account.counter, self._level())
            self._waiting[client] = account
        insort(account.items, (order, item), key=itemgetter(0))

    def first(self) -> T | None:
        """Return the item that is next, or None if nothing waits."""
        account = self._next()
        return account.items[0][1] if account else None

    def pop(self) -> T:
        """Remove and return the item that is next.

        Raises:
            IndexError: nothing waits.
        """
        account = self._next()
        if account is None:
            raise IndexError("pop from an empty queue")
        return self._take(account, 0)

    def remove(self, client: Hashable, item: T) -> bool:
        """Remove `item` from wherever it stands; return whether it waited."""
        account = self._waiting.get(client)
        if account is not None:
            for at, (_, other) in enumerate(account.items):
                if other is item:
                    self._take(account, at)
                    return True
        return False

    def charge(self, client: Hashable, tokens: float) -> None:
        """Count service for `client`, waiting or not; an unknown client is ignored."""
        assert tokens >= 0
        if client in self._accounts:
            self._accounts[client].counter += tokens

    def forget(self, client: Hashable) -> None:
        """Forget the counter of a client that has nothing waiting or running any more."""
        assert client not in self._waiting, "work of this client waits"
        self._accounts.pop(client, None)

    def _next(self) -> _Account[T] | None:
        """Return the least served account that has items; among equals, that of the oldest item."""
        return min(
            self._waiting.values(),
            key=lambda account: (account.counter, account.items[0][0]),
            default=None,
        )

    def _level(self) -> float:
        """Return the counter of the least served client that waits, or of the last that did."""
        account = self._next() or self._last_waiting
        return account.counter if account else 0.0

    def _take(self, account: _Account[T], at: int) -> T:
        item = account.items.pop(at)[1]
        if not account.items:
            del self._waiting[account.client]
            self._last_waiting = account
        return item

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert self._waiting == {c: a for c, a in self._accounts.items() if a.items}
        for client, account in self._accounts.items():
            assert account.client == client
            orders = [order for order, _ in account.items]
            assert orders == sorted(orders)
        assert len({id(item) for item in self}) == len(self), "an item waits twice"


def shared_out(prompts: Iterable[Answer], budget: int) -> Iterator[tuple[Answer, int]]:
    """Yield answers and how many tokens of each to compute, `budget` tokens in all.

    Clients get equal shares. Within a client the oldest answer is first; what a client does not
    need of its share goes to the others.

    Args:
        prompts: answers with more than one unscheduled token, oldest first.
    """
    clients: dict[Hashable, list[Answer]] = {}
    for answer in prompts:
        clients.setdefault(answer.request.client, []).append(answer)
    wanted = {one: sum(a.num_unscheduled_tokens for a in own) for one, own in clients.items()}
    for at, client in enumerate(sorted(clients, key=wanted.__getitem__)):
        share = -(-budget // (len(clients) - at))
        for answer in clients[client]:
            size = min(answer.num_unscheduled_tokens, share)
            if size <= 0:
                break
            share -= size
            budget -= size
            yield answer, size
