"""Admission: on which pipeline the next waiting answer runs. Pure."""

from distributed_llm.common.types import Epoch
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.kv_ledger import prefix_key
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook

_MUCH_BUSIER = 2
"""How many times as busy as the least busy pipeline one may be for its prefixes to count."""


class Admission:
    """Lets waiting answers run, as long as there is room for the next one.

    Pipelines that had no room are asked again only when something in them has changed, or when
    another answer is next.

    Args:
        book: holds the waiting answers, in their order.
    """

    def __init__(self, book: RequestBook, event_log: EventLog) -> None:
        self._book = book
        self._event_log = event_log
        self._open: dict[Epoch, Pipeline] = {}  # by epoch; may have room, or be dissolved by now
        self._full: dict[Epoch, Pipeline] = {}  # by epoch; have no room for `_head`
        self._head: Answer | None = None  # the answer that was next at the last call

    def may_have_room(self, pipeline: Pipeline) -> None:
        """Ask `pipeline` again: something in it has changed."""
        if pipeline.scheduler and pipeline.scheduler.has_seat:
            self._open[pipeline.epoch] = pipeline
            self._full.pop(pipeline.epoch, None)

    def admit(self, room_tokens: int, *, now: float) -> None:
        """Let waiting answers run until there is no room for the next one.

        Args:
            room_tokens: positions that one answer may take on some pipeline that serves; 0 if none
                does.
        """
        while room_tokens and (answer := self._book.next_waiting(room_tokens, now=now)):
            if answer is not self._head:
                self._head = answer
                self._open |= self._full
                self._full.clear()
            if not self._open:
                return
            pipeline = self._choose(answer)
            if pipeline.scheduler and self._book.admit(pipeline.scheduler, now=now):
                self._event_log.trace(
                    EventKind.ANSWER_ADMITTED,
                    answer.request.key[1],
                    epoch=pipeline.epoch,
                    choice=answer.choice,
                )
                continue
            del self._open[pipeline.epoch]
            if pipeline.scheduler is not None and pipeline.scheduler.has_seat:
                self._full[pipeline.epoch] = pipeline

    def _choose(self, answer: Answer) -> Pipeline:
        """Return the open pipeline with most of an answer in its KV cache, else the least loaded.

        A shared prefix does not count in a pipeline that is much busier than the least busy one.
        """
        key = prefix_key(answer.token_ids)
        least = min(pipeline.num_running for pipeline in self._open.values())
        most = _MUCH_BUSIER * (least + 1)
        ranked = [
            (_hit_length(pipeline, answer, key, most), -pipeline.expected_round_s, -epoch)
            for epoch, pipeline in self._open.items()
        ]
        return self._open[Epoch(-max(ranked)[2])]


def _hit_length(pipeline: Pipeline, answer: Answer, key: int, most_running: int) -> int:
    scheduler = pipeline.scheduler
    if scheduler is None or scheduler.num_running > most_running or not scheduler.may_hit(key):
        return 0
    return scheduler.hit_length(answer)
