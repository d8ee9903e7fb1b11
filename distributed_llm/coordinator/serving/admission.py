"""On which pipeline the request runs whose turn it is. Pure."""

from distributed_llm.coordinator.requests.request import Request
from distributed_llm.coordinator.serving.kv_ledger import prefix_key
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook

_MUCH_BUSIER = 2


class Admission:
    """Lets waiting requests run.

    Args:
        desk: has the requests, in their order.
    """

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._open: dict[int, Pipeline] = {}  # by epoch; they may have room, or be dissolved
        self._full: dict[int, Pipeline] = {}  # likewise; they have none for the request below
        self._head: Request | None = None  # whose turn it was last

    def may_have_room(self, pipeline: Pipeline) -> None:
        """Something in a pipeline has changed: it is asked again."""
        if pipeline.scheduler and pipeline.scheduler.has_seat:
            self._open[pipeline.epoch] = pipeline
            self._full.pop(pipeline.epoch, None)

    def admit(self, *, now: float) -> None:
        """Let waiting requests run as long as there is room for the next one."""
        while (request := self._book.next_waiting()) is not None:
            if request is not self._head:
                self._head = request
                self._open |= self._full
                self._full.clear()
            if not self._open:
                return
            pipeline = self._choose(request)
            if pipeline.scheduler is None or not self._book.admit(pipeline.scheduler, now=now):
                del self._open[pipeline.epoch]
                if pipeline.scheduler is not None and pipeline.scheduler.has_seat:
                    self._full[pipeline.epoch] = pipeline

    def _choose(self, request: Request) -> Pipeline:
        """Return where it finds most of its prompt computed, or else where it waits least.

        A pipeline that is far busier than another one is not worth a shared prefix.
        """
        key = prefix_key(request.token_ids)
        least = min(pipeline.num_running for pipeline in self._open.values())
        most = _MUCH_BUSIER * (least + 1)
        choice = [
            (_hit_length(pipeline, request, key, most), -pipeline.load, -epoch)
            for epoch, pipeline in self._open.items()
        ]
        return self._open[-max(choice)[2]]


def _hit_length(pipeline: Pipeline, request: Request, key: int, most_running: int) -> int:
    scheduler = pipeline.scheduler
    if scheduler is None or scheduler.num_running > most_running or not scheduler.may_hit(key):
        return 0
    return scheduler.hit_length(request)
