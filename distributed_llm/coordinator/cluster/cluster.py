"""The state that the parts of a coordinator share: its workers, pipelines and requests."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import ITEM_BYTES
from distributed_llm.common.types import KV_BLOCK, WorkerId
from distributed_llm.coordinator.cluster.pipelines import Pipelines
from distributed_llm.coordinator.cluster.registry import Registry
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.kv_windows import KVWindows
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.plan import Plan, kv_tokens_of, windows_of
from distributed_llm.coordinator.requests.text_questions import TextQuestions
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.speeds.measurements import Measurements


@dataclass(frozen=True)
class Cluster:
    """The state of one coordinator; its parts read and change it.

    Attributes:
        registry: who is there.
        pipelines: who serves which layers.
        book: what clients asked for.
        questions: what they asked about text.
        measurements: how fast machines and links are.
        event_log: what happened lately.
    """

    model: ServedModel
    settings: CoordinatorSettings
    registry: Registry
    pipelines: Pipelines
    book: RequestBook
    questions: TextQuestions
    measurements: Measurements
    event_log: EventLog

    @classmethod
    def create(
        cls, model: ServedModel, settings: CoordinatorSettings, *, draw_seed: Callable[[], int]
    ) -> "Cluster":
        """Return a cluster without workers.

        Args:
            model: what is served.
            settings: how.
            draw_seed: draws random numbers, for the seeds of requests and the keys of plans.
        """
        registry = Registry(
            silence_timeout_s=settings.silence_timeout_s, task_timeout_s=settings.task_timeout_s
        )
        event_log = EventLog(model.cost.encoder_layers)
        book = RequestBook(
            model.defaults,
            event_log,
            max_waiting=settings.max_waiting_requests,
            draw_seed=draw_seed,
            share_prefixes=settings.share_prefixes == "all",
        )
        questions = TextQuestions(
            model.defaults.context_length,
            max_waiting=settings.max_waiting_requests,
            draw_number=book.draw_number,
        )
        measurements = Measurements(
            model.cost,
            item_bytes=ITEM_BYTES[model.dtype],
            bytes_per_token=model.activation_bytes,
        )
        pipelines = Pipelines(
            model,
            settings,
            registry,
            book,
            measurements,
            event_log,
            draw_key=lambda: f"{draw_seed():016x}{draw_seed():016x}",
        )
        return cls(model, settings, registry, pipelines, book, questions, measurements, event_log)

    def memory_of(self, workers: Iterable[Worker]) -> dict[WorkerId, int]:
        """Return what each of these workers has room for: weights and KV cache, bytes."""
        planned = self.model.planned
        return {worker.id: planned(worker.capabilities).memory_bytes for worker in workers}

    def needed_tokens(self, pipeline: Pipeline, windows: KVWindows | None = None) -> int:
        """Return the positions of capacity without which a new plan would fail requests.

        Args:
            windows: of the layers of that plan, by which all is charged; None: as they are now.
        """
        scheduler, windows = pipeline.scheduler, windows or pipeline.kv_windows
        used = scheduler.needed_tokens(windows) if scheduler else 0
        largest = min(self.book.most_reserved, pipeline.longest_tokens)
        return max(used, windows.capacity(largest))

    def goes_on_in(self, plan: Plan, pipeline: Pipeline) -> bool:
        """Return whether a plan has room for what runs on a pipeline, and for each that waits.

        A search for plans knows what they need by the prices of the pipeline's own.
        """
        cost = self.model.cost_at(plan[0].quantize)
        windows = windows_of(plan, cost, self.settings.max_batch_tokens)
        return kv_tokens_of(plan) // KV_BLOCK * KV_BLOCK >= self.needed_tokens(pipeline, windows)
