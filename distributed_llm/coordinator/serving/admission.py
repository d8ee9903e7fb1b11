"""Admission: on which pipeline the next waiting answer runs. Pure."""

from collections.abc import Mapping

from distributed_llm.common.types import Epoch
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.event_log import EventKind, EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.prefix_index import prefix_key
from distributed_llm.coordinator.serving.request_book import RequestBook

_MUCH_BUSIER = 2
"""How many times as busy as the least busy pipeline one may be for its prefixes to count."""


class Admission:
    """Lets waiting answers run, as long as there is room for the next one.

    Of the answers that one pipeline may hold, the next one comes first there, even if others are
    before it for which only a roomier pipeline will do. Pipelines that had no room are asked again
    only when something in them has changed, or when another answer is next.

    Args:
        book: holds the waiting answers, in their order.
    """

    def __init__(self, book: RequestBook, event_log: EventLog) -> None:
        self._book = book
        self._event_log = event_log
        self._open: dict[Epoch, Pipeline] = {}  # by epoch; may have room, or be dissolved by now
        self._full: dict[Epoch, tuple[Pipeline, Answer]] = {}  # likewise; who had no room there

    def may_have_room(self, pipeline: Pipeline) -> None:
        """Ask `pipeline` again: something in it has changed."""
        if pipeline.scheduler and pipeline.scheduler.has_seat:
            self._open[pipeline.epoch] = pipeline
            self._full.pop(pipeline.epoch, None)

    def admit(self, *, now: float) -> None:
        """Let waiting answers run until there is no room for the next ones."""
        for room_tokens in self._rooms():
            while answer := self._book.waiting.next(room_tokens, now=now):
                self._open_for(answer, room_tokens)
                open_to_it = self._open_to(answer)
                if not open_to_it:
                    break
                self._try(answer, self._choose(answer, open_to_it), now)

    def _rooms(self) -> list[int]:
        """Return the positions that one answer may take on pipelines with a seat, most first."""
        self._open = {epoch: one for epoch, one in self._open.items() if one.scheduler}
        self._full = {epoch: full for epoch, full in self._full.items() if full[0].scheduler}
        pipelines = (*self._open.values(), *(pipeline for pipeline, _ in self._full.values()))
        return sorted({_room(pipeline) for pipeline in pipelines}, reverse=True)

    def _open_for(self, answer: Answer, room_tokens: int) -> None:
        """Ask pipelines of this room again that had none for another answer than this."""
        for epoch, (pipeline, refused) in list(self._full.items()):
            if refused is not answer and _room(pipeline) == room_tokens:
                self._open[epoch] = pipeline
                del self._full[epoch]

    def _open_to(self, answer: Answer) -> dict[Epoch, Pipeline]:
        """Return the open pipelines that may hold an answer."""
        needed = answer.request.reserved_tokens
        return {epoch: one for epoch, one in self._open.items() if needed <= _room(one)}

    def _try(self, answer: Answer, pipeline: Pipeline, now: float) -> None:
        """Let the next answer run on a pipeline, or note that there is no room for it."""
        assert pipeline.scheduler is not None
        if self._book.admit(pipeline.scheduler, now=now):
            self._event_log.trace(
                EventKind.ANSWER_ADMITTED,
                answer.request.key[1],
                epoch=pipeline.epoch,
                choice=answer.choice,
            )
            return
        del self._open[pipeline.epoch]
        if pipeline.scheduler.has_seat:
            self._full[pipeline.epoch] = pipeline, answer

    def _choose(self, answer: Answer, pipelines: Mapping[Epoch, Pipeline]) -> Pipeline:
        """Return the pipeline with most of an answer in its KV cache, else the least loaded.

        A shared prefix does not count in a pipeline that is much busier than the least busy one.
        """
        key = prefix_key(answer.token_ids, answer.request.shares_with)
        least = min(pipeline.num_running for pipeline in pipelines.values())
        most = _MUCH_BUSIER * (least + 1)
        ranked = [
            (_hit_length(pipeline, answer, key, most), -pipeline.expected_round_s, -epoch)
            for epoch, pipeline in pipelines.items()
        ]
        return pipelines[Epoch(-max(ranked)[2])]


def _room(pipeline: Pipeline) -> int:
    """Return the positions that one answer may take on a pipeline now; 0 if it serves no more."""
    return pipeline.scheduler.kv_tokens if pipeline.scheduler else 0


def _hit_length(pipeline: Pipeline, answer: Answer, key: int, most_running: int) -> int:
    scheduler = pipeline.scheduler
    if scheduler is None or scheduler.num_running > most_running or not scheduler.may_hit(key):
        return 0
    return scheduler.hit_length(answer)
