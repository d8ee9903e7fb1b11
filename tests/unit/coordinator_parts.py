"""The parts of a coordinator behind its core, with numbers that can be checked by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from distributed_llm.common.messages import (
    Capabilities,
    Generate,
    ModelSource,
    StageReady,
    WorkerHello,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import Epoch, LayerRange, PeerId, WorkerId
from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.departures import Departures
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.pipelines import Pipelines
from distributed_llm.coordinator.cluster.rebalancing import Rebalancing
from distributed_llm.coordinator.cluster.registry import Registry
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Send, Study, Tokenize, Tokenized
from distributed_llm.coordinator.model import GenerationDefaults, ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.plan import LayerMap, Plan, plan_of
from distributed_llm.coordinator.planning.plan_question import PlanReply
from distributed_llm.coordinator.planning.planner import Planner
from distributed_llm.coordinator.requests.answer_states import AnswerCause
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.requests.text_questions import TextQuestions
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.pipeline import Pipeline
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.speeds.measurements import Measurements
from distributed_llm.coordinator.speeds.work import Work

COST = ModelCost(
    (1000,) * 6, first_bytes=500, last_bytes=300, shared_bytes=0, layer_kv_bytes=(1,) * 6
)
CLIENT = PeerId(b"client")


class Known(Measurements):
    """Measurements that were told what to say.

    Attributes:
        layer_times: what a layer takes for a chunk of a prompt, by worker, seconds; 1 where nothing
            is said.
        rate: what a link carries, bytes per second.
    """

    layer_times: Mapping[str, float] = {}
    rate = 64.0

    def layer_s(self, worker: WorkerId, prompt: Work) -> float:
        """Return what was said."""
        return self.layer_times.get(worker, 1.0)

    @property
    def link_bytes_per_s(self) -> float:
        """What was said."""
        return self.rate


@dataclass(frozen=True)
class Roomy(Planner):
    """A planner that leaves room for a number of positions that it is told."""

    room: int = 0

    def kv_tokens(self, memory: Mapping[WorkerId, int]) -> int:
        """Return that number."""
        return self.room


class Parts:
    """A cluster without a network.

    Args:
        memory: of each worker, bytes.
        cost: of the model.
        kv_tokens: positions that plans by speed leave room for; None is as many as usual.
        smaller: what the model may shrink to.
        settings: others than the usual ones.
    """

    def __init__(
        self,
        memory: Mapping[str, int],
        cost: ModelCost = COST,
        *,
        kv_tokens: int | None = None,
        smaller: tuple[ModelCost, ...] = (),
        **settings: Any,
    ) -> None:
        given = CoordinatorSettings(**{"min_kv_tokens": 64, "replicas": 1, **settings})
        self.cost = cost
        self._numbers = count()
        model = ServedModel(
            name="small",
            source=ModelSource(kind="builtin", name=""),
            dtype="float32",
            wire_dtype="float32",
            cost=cost,
            hidden_size=4,
            defaults=GenerationDefaults(2048, 50, (49,), SamplingParams()),
            digest=str,
            smaller=smaller,
            may_shrink=bool(smaller),
        )
        self.registry = Registry(silence_timeout_s=4.0, task_timeout_s=given.task_timeout_s)
        self.event_log = EventLog()
        self.book = RequestBook(model.defaults, self.event_log, max_waiting=99, draw_seed=lambda: 1)
        self.measurements = Known(cost, item_bytes=4, bytes_per_token=16)
        self.planner = Planner.from_settings(model, given)
        if kv_tokens is not None:
            self.planner = Roomy(**vars(self.planner), room=kv_tokens)
        self.pipelines = Pipelines(
            model,
            given,
            self.registry,
            self.book,
            self.measurements,
            self.event_log,
            draw_key=lambda: "key",
        )
        self.cluster = Cluster(
            model,
            given,
            self.registry,
            self.pipelines,
            self.book,
            TextQuestions(2048, max_waiting=99, draw_number=self.book.draw_number),
            self.measurements,
            self.event_log,
        )
        self.replanning = Replanning(self.cluster, self.planner)
        self.moves = Moves(self.cluster)
        self.departures = Departures(self.cluster, self.planner, self.replanning, self.moves)
        self.rebalancing = Rebalancing(self.cluster, self.planner, self.replanning, self.moves)
        for name, size in memory.items():
            self.join(name, size)

    def join(self, name: str, memory_bytes: int) -> Worker:
        """Return a worker that says hello."""
        hello = WorkerHello(name=name, instance=name, capabilities=capabilities(memory_bytes))
        worker = self.registry.add_worker(PeerId(name.encode()), hello, now=0.0)
        self.measurements.joined(worker.id, hello.capabilities)
        return worker

    def answered(self, actions: Sequence[Action], now: float = 10.0) -> list[Action]:
        """Answer the questions about plans among actions; return the others and what follows."""
        done: list[Action] = []
        for action in actions:
            if not isinstance(action, Study):
                done.append(action)
                continue
            reply = action.question.reply()
            assert isinstance(reply, PlanReply)
            if reply.question.leaving is None:
                moving = self.moves.move is not None
                done += self.answered(self.replanning.replied(reply, moving=moving), now)
            else:
                done += self.answered(self.departures.planned(reply, now=now), now)
        return done

    def worker(self, name: str) -> Worker:
        """Return one of the workers."""
        found = self.registry.worker(PeerId(name.encode()))
        assert found is not None
        return found

    def plan(self, *ranges: tuple[str, int, int]) -> Plan:
        """Return the plan in which these workers have these layers."""
        memory = {worker.id: worker.capabilities.memory_bytes for worker in self.registry.workers}
        return plan_of(self.cost, memory, ranges_of(*ranges))

    def serve(self, *ranges: tuple[str, int, int]) -> Pipeline:
        """Return a pipeline that serves."""
        self.pipelines.load([self.plan(*ranges)])
        pipeline = self.pipelines.all[-1]
        for name, _, _ in ranges:
            self.pipelines.stage_ready(self.worker(name), ready(pipeline.epoch, load_s=0.0))
        assert pipeline.in_flight
        return pipeline

    def ask(self, pipeline: Pipeline, prompt: int, new_tokens: int = 20) -> Answer:
        """Return an answer that runs on a pipeline; no two begin alike."""
        assert pipeline.scheduler
        answer = self.waiting(prompt, new_tokens)
        assert self.book.admit(pipeline.scheduler, now=0.0)
        return answer

    def keep(self, pipeline: Pipeline, prompt: int) -> None:
        """Have an answer that has ended kept as a prefix for later ones."""
        answer = self.ask(pipeline, prompt)
        assert pipeline.scheduler
        assert answer.sequence_id
        pipeline.scheduler._ledger.computed(answer.sequence_id, prompt)
        self.book._withdraw(answer, keep=True)
        answer.change(AnswerCause.LAST_TOKEN)

    def waiting(self, prompt: int, new_tokens: int = 20) -> Answer:
        """Return an answer whose turn it is."""
        number = next(self._numbers)
        params = SamplingParams(max_new_tokens=new_tokens)
        generate = Generate(request_id=f"r{number}", prompt="token_ids", params=params, tensors=())
        (order,) = self.book.submit(CLIENT, generate, (), now=0.0)
        assert isinstance(order, Tokenize)
        self.book.tokenized(Tokenized(order.key, [(number + at) % 49 for at in range(prompt)]))
        answer = self.book.waiting.next(1 << 30, now=0.0)
        assert answer
        return answer

    def goes_on(self) -> None:
        """Begin steps where they may be begun, and assert the invariants."""
        for pipeline in self.pipelines.all:
            pipeline.begin_steps(now=20.0)
        self.pipelines.validate()


def ranges_of(*ranges: tuple[str, int, int]) -> LayerMap:
    """Return who has which layers."""
    return tuple((WorkerId(name), LayerRange(start, stop)) for name, start, stop in ranges)


def ready(epoch: int, load_s: float = 1.0, fetch_s: float = 0.0) -> StageReady:
    """Return what a worker says once it has loaded its layers."""
    return StageReady(
        epoch=Epoch(epoch),
        credits=4,
        load_s=load_s,
        weight_bytes=1,
        kv_tokens=1 << 20,
        fetch_s=fetch_s,
    )


def capabilities(memory_bytes: int) -> Capabilities:
    """Return those of a machine with this much memory."""
    return Capabilities(
        device="cpu",
        device_name="made up",
        platform="none",
        memory_bytes=memory_bytes,
        cores=1,
        threads=1,
        memory_bandwidth_bytes_per_s=1e6,
        flops_per_s=1e9,
    )


def sent(actions: Sequence[Action]) -> list[tuple[str, type]]:
    """Return to whom what is sent."""
    return [(a.peer.decode(), type(a.message)) for a in actions if isinstance(a, Send)]
