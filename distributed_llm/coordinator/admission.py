"""On which pipeline the request runs whose turn it is. Pure."""

from distributed_llm.coordinator.desk import Desk
from distributed_llm.coordinator.kv_ledger import prefix_key
from distributed_llm.coordinator.replica import Replica
from distributed_llm.coordinator.requests import Request

_MUCH_BUSIER = 2


class Admission:
    """Lets waiting requests run.

    Args:
        desk: has the requests, in their order.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._open: dict[int, Replica] = {}  # by epoch; they may have room, or be dissolved
        self._full: dict[int, Replica] = {}  # likewise; they have none for the request below
        self._head: Request | None = None  # whose turn it was last

    def may_have_room(self, replica: Replica) -> None:
        """Something in a pipeline has changed: it is asked again."""
        if replica.scheduler and replica.scheduler.has_seat:
            self._open[replica.epoch] = replica
            self._full.pop(replica.epoch, None)

    def admit(self, *, now: float) -> None:
        """Let waiting requests run as long as there is room for the next one."""
        while (request := self._desk.next_waiting()) is not None:
            if request is not self._head:
                self._head = request
                self._open |= self._full
                self._full.clear()
            if not self._open:
                return
            replica = self._choose(request)
            if replica.scheduler is None or not self._desk.admit(replica.scheduler, now=now):
                del self._open[replica.epoch]
                if replica.scheduler is not None and replica.scheduler.has_seat:
                    self._full[replica.epoch] = replica

    def _choose(self, request: Request) -> Replica:
        """Return where it finds most of its prompt computed, or else where it waits least.

        A pipeline that is far busier than another one is not worth a shared prefix.
        """
        key = prefix_key(request.token_ids)
        least = min(replica.num_running for replica in self._open.values())
        most = _MUCH_BUSIER * (least + 1)
        choice = [
            (_hit_length(replica, request, key, most), -replica.load, -epoch)
            for epoch, replica in self._open.items()
        ]
        return self._open[-max(choice)[2]]


def _hit_length(replica: Replica, request: Request, key: int, most_running: int) -> int:
    scheduler = replica.scheduler
    if scheduler is None or scheduler.num_running > most_running or not scheduler.may_hit(key):
        return 0
    return scheduler.hit_length(request)
