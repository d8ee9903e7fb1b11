"""A script has production agents move layers, whatever goes wrong meanwhile.

The script plays the coordinator: it generates tokens step by step, orders moves, and cancels them
when a worker reports a failure, or at any moment. No wait may last, no worker may run the old
layers after the new ones, and no token may differ from what one machine gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from distributed_llm.common import codec
from distributed_llm.common.messages import (
    CopyKV,
    DropStage,
    FromClient,
    FromWorker,
    HandedOver,
    HandOver,
    Heartbeat,
    KVCopied,
    KVEnd,
    KVFailed,
    KVPieces,
    KVTaken,
    KVTransfer,
    LinkReport,
    LoadStage,
    NextStage,
    PeerWelcome,
    Pong,
    Remeasured,
    SequenceSlice,
    StageReady,
    StageTime,
    Task,
    TaskFailed,
    TaskResult,
    ToCoordinator,
    ToWorker,
    UndoMove,
    WeightRequest,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import Frame, TensorSpec, frame_of_token_ids, token_ids_of_frame
from distributed_llm.common.types import Epoch, LayerRange, SequenceId, StepNumber
from distributed_llm.coordinator import events
from tests.unit.fake_model import MODEL, NUM_LAYERS, reference
from tests.unit.fake_worker import SimWorker
from tests.unit.simulation import Fault, Link, World

Plan = tuple[tuple[int, LayerRange], ...]
"""Which worker has which layers, in their order."""

Pair = tuple[TensorSpec, Frame]

PROMPTS = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (20, 21), (30, 31, 32, 33, 34))
_MORE = 20
"""Tokens that may be generated while layers move."""

_LEASE_S = 3.0
_PATIENCE_S = 60.0


@dataclass
class Sequence_:
    """One answer in the making."""

    tokens: list[int]
    computed: int = 0


@dataclass
class Step:
    """What is under way."""

    epoch: int
    number: int
    slices: tuple[SequenceSlice, ...]
    ids: Pair
    stage: int = 0


@dataclass
class Told:
    """What workers told of an epoch."""

    ready: set[SimWorker] = field(default_factory=set)
    copied: set[SimWorker] = field(default_factory=set)
    handed_over: set[SimWorker] = field(default_factory=set)
    failed: list[KVFailed] = field(default_factory=list)
    links: set[SimWorker] = field(default_factory=set)


class Script(World):
    """A network whose coordinator is this script."""

    def __init__(self, count: int, *, seed: int) -> None:
        super().__init__(seed=seed, delay_s=(0.001, 0.01))
        self.serving_epoch = 0
        self.layout: Plan = ()
        self.told: dict[int, Told] = {}
        self.answers = [Sequence_(list(prompt)) for prompt in PROMPTS]
        self.paused = True
        self.limit = 0  # of tokens in an answer
        self.step: Step | None = None
        self.num_lost = 0
        self._number = 0
        self.machines = [self.worker(f"w{i}") for i in range(count)]
        self.names: set[str] = set()
        assert self.run(lambda: len(self.names) == count, for_s=5.0)

    def _do(self, event: events.Event) -> None:
        """Leave out the core."""

    def say(self, worker: SimWorker, message: ToWorker, frames: Sequence[Frame] = ()) -> None:
        self._send_down(worker.link.peer, message, frames)

    def send_up(
        self, link: Link, message: FromWorker | FromClient, frames: Sequence[Frame]
    ) -> None:
        decoded, tensors = codec.to_coordinator.decode(codec.encode(message, frames))
        assert isinstance(link.owner, SimWorker)
        assert not isinstance(decoded, WeightRequest)
        worker = link.owner
        link.up_at = max(link.up_at, self.now + self._delay())
        self.at_time(link.up_at, lambda: self._heard(worker, decoded, tensors))

    def _heard(self, worker: SimWorker, message: ToCoordinator, frames: Sequence[Frame]) -> None:
        match message:
            case WorkerHello(name=name):
                welcome = Welcome(worker_id=name, heartbeat_interval_s=1.0, silence_timeout_s=4.0)
                self.say(worker, welcome)
                self.names.add(name)
            case Heartbeat():
                self.say(worker, Pong())
            case Remeasured():
                pass
            case StageReady(epoch=epoch):
                self.told[epoch].ready.add(worker)
            case KVCopied(epoch=epoch):
                assert worker not in self.told[epoch].copied
                self.told[epoch].copied.add(worker)
            case HandedOver(epoch=epoch):
                assert worker not in self.told[epoch].handed_over
                self.told[epoch].handed_over.add(worker)
            case KVFailed(epoch=epoch):
                self.told[epoch].failed.append(message)
            case LinkReport(epoch=epoch, up=up):
                links = self.told[epoch].links
                links.add(worker) if up else links.discard(worker)
            case TaskResult():
                self._result(message, frames)
            case TaskFailed():
                raise AssertionError(message)
            case _:
                raise AssertionError(message)

    # -------------------------------------------------------------- steps

    def begin(self) -> None:
        """Begin the next step, of all answers."""
        if self.paused or self.step or len(self.answers[0].tokens) >= self.limit:
            return
        self._number += 1
        sampling = Sampling(temperature=0.0, seed=7)
        slices = tuple(
            SequenceSlice(
                sequence_id=SequenceId(i),
                start=one.computed,
                num_tokens=len(one.tokens) - one.computed,
                sample=True,
                sampling=sampling,
            )
            for i, one in enumerate(self.answers)
        )
        ids = [token for one in self.answers for token in one.tokens[one.computed :]]
        self.step = Step(self.serving_epoch, self._number, slices, frame_of_token_ids(ids))
        self._send_step(self.step, (), ())
        self.at(_LEASE_S, lambda step=self.step: self._lost(step))  # type: ignore[misc]

    def _send_step(self, step: Step, hidden: Sequence[Pair], times: Sequence[StageTime]) -> None:
        links = self.told[step.epoch].links
        rest = [self.machines[number] for number, _ in self.layout[step.stage : -1]]
        pairs = [step.ids, *hidden]
        task = Task(
            epoch=Epoch(step.epoch),
            step=StepNumber(step.number),
            oldest=StepNumber(step.number),
            sequences=step.slices,
            tensors=tuple(spec for spec, _ in pairs),
            route=tuple(worker in links for worker in rest),
            timings=tuple(times),
        )
        worker = self.machines[self.layout[step.stage][0]]
        self.say(worker, task, [frame for _, frame in pairs])

    def _lost(self, step: Step) -> None:
        if self.step is step:
            self.num_lost += 1
            self.step = None
            self.begin()

    def _result(self, result: TaskResult, frames: Sequence[Frame]) -> None:
        step = self.step
        if step is None or (result.epoch, result.step) != (step.epoch, step.number):
            return
        if len(result.timings) < len(self.layout):
            step.stage = len(result.timings)
            hidden = [*zip(result.tensors, frames, strict=True)]
            self._send_step(step, hidden, result.timings)
            return
        for one, token in zip(self.answers, token_ids_of_frame(frames[0]), strict=True):
            one.computed = len(one.tokens)
            one.tokens.append(token)
        self.step = None
        self.begin()

    def go_on(self) -> None:
        self.paused = False
        self.begin()

    def generate(self, count: int) -> None:
        """Let so many tokens of each answer be generated."""
        length = len(self.answers[0].tokens) + count
        self.limit = length + _MORE
        self.go_on()
        assert self.run(lambda: len(self.answers[0].tokens) >= length, for_s=_PATIENCE_S)

    def pause(self) -> None:
        """Begin no more steps, and wait until the one in flight has ended."""
        self.paused = True
        assert self.run(lambda: self.step is None, for_s=_PATIENCE_S)

    # -------------------------------------------------------------- plans

    def order(self, epoch: int, plan: Plan, *, beside: Epoch | None) -> None:
        """Have a plan loaded: in the place of all others, or beside this epoch."""
        self.told[epoch] = Told()
        for (number, layers), following in zip(plan, (*plan[1:], None), strict=True):
            worker = self.machines[number]
            after = None
            if following:
                other = self.machines[following[0]]
                after = NextStage(worker=other.name, addresses=(other.address,))
            imports = tuple(
                common
                for old, common in self._sources(number, layers)
                if beside is not None and old != number
            )
            load = LoadStage(
                epoch=Epoch(epoch),
                source=MODEL.source,
                layers=layers,
                dtype="int32",
                wire_dtype="int32",
                digest="d",
                kv_tokens=6400,
                link_key=f"key {epoch}",
                next_stage=after,
                beside=beside,
                imports=imports,
            )
            self.say(worker, load)

    def _sources(self, number: int, layers: LayerRange) -> list[tuple[int, LayerRange]]:
        """Return who has which of these layers."""
        sources = []
        for old, held in self.layout:
            start, stop = max(held.start, layers.start), min(held.stop, layers.stop)
            if start < stop:
                sources.append((old, LayerRange(start, stop)))
        return sources

    def transfers(self, plan: Plan) -> dict[int, list[KVTransfer]]:
        """Return what each worker must send."""
        by_sender: dict[int, list[KVTransfer]] = {}
        for number, layers in plan:
            worker = self.machines[number]
            for old, common in self._sources(number, layers):
                if old != number:
                    transfer = KVTransfer(
                        layers=common, worker=worker.name, addresses=(worker.address,)
                    )
                    by_sender.setdefault(old, []).append(transfer)
        return by_sender

    def serve(self, plan: Plan) -> None:
        """Begin with a first plan."""
        self.order(1, plan, beside=None)
        self.serving_epoch, self.layout = 1, plan
        assert self.run(lambda: len(self.told[1].ready) == len(plan), for_s=_PATIENCE_S)

    def try_to_move(self, epoch: int, plan: Plan, cancelled: Callable[[], bool]) -> bool:
        """Return whether the layers moved; if not, everything is as it was."""
        involved = {number for number, _ in (*self.layout, *plan)}
        self.order(epoch, plan, beside=Epoch(self.serving_epoch))
        told = self.told[epoch]
        sends = self.transfers(plan)
        senders = {self.machines[number] for number in sends}
        holders = {self.machines[number] for number, _ in plan}  # of the new stages

        def over() -> bool:
            return bool(told.failed) or cancelled()

        def phase(done: Callable[[], bool]) -> bool:
            assert self.run(lambda: done() or over(), for_s=_PATIENCE_S), "it hangs"
            return not over()

        moved = phase(lambda: told.ready == holders)
        if moved:
            for number, transfers in sends.items():
                copy = CopyKV(
                    epoch=Epoch(epoch), link_key=f"key {epoch}", transfers=tuple(transfers)
                )
                self.say(self.machines[number], copy)
            moved = phase(lambda: told.copied == senders)
        if moved:
            self.pause()
            for worker in senders | holders:
                self.say(worker, HandOver(epoch=Epoch(epoch), first_step=StepNumber(1)))
            moved = phase(lambda: told.handed_over == holders)
        if moved:
            before = self.serving_epoch
            for number, _ in self.layout:
                self.say(self.machines[number], DropStage(epoch=Epoch(before)))
            self.serving_epoch, self.layout = epoch, plan
        else:
            for number in involved:
                self.say(self.machines[number], UndoMove(epoch=Epoch(epoch)))
        self.go_on()
        return moved

    # -------------------------------------------------------------- the end

    def check(self) -> None:
        """Everything is as it would be without moves, and nothing is left of them."""
        members = {number for number, _ in self.layout}
        for number, worker in enumerate(self.machines):
            epochs = (self.serving_epoch,) if number in members else ()
            assert worker.agent._stages.epochs == epochs
            assert worker.agent._stages._kv_move is None
            assert worker.beside is None
            assert not worker._exports
            assert not [
                name for name in worker._links if name.layers or name.epoch != self.serving_epoch
            ]
            assert (worker.stage is not None) is (number in members)
            if worker.stage:
                assert worker.stage.layers == dict(self.layout)[number]
        params = SamplingParams(temperature=0.0, seed=7, ignore_eos=True, max_new_tokens=400)
        for prompt, one in zip(PROMPTS, self.answers, strict=True):
            given_ = one.tokens[len(prompt) :]
            assert given_ == reference(prompt, params)[: len(given_)]


@st.composite
def plans(draw: st.DrawFn, count: int) -> Plan:
    workers = draw(st.permutations(range(count)))[: draw(st.integers(1, count))]
    cuts = sorted(
        draw(
            st.sets(
                st.integers(1, NUM_LAYERS - 1), min_size=len(workers) - 1, max_size=len(workers) - 1
            )
        )
    )
    ends = [0, *cuts, NUM_LAYERS]
    return tuple(
        (worker, LayerRange(start, stop))
        for worker, start, stop in zip(workers, ends[:-1], ends[1:], strict=True)
    )


def disturb(script: Script, what: str, one: int, other: int) -> None:
    """Let something go wrong."""
    worker = script.machines[one % len(script.machines)]
    match what:
        case "cut links":
            worker.cut()
        case "cut transfers":
            worker.cut(transfers=True)
        case "apart":
            script.apart.add((worker, script.machines[other % len(script.machines)]))
        case "together":
            script.apart.clear()
        case "lose pieces":
            script.faults.append(Fault(KVPieces, "drop", peer_of=worker))
        case "lose end":
            script.faults.append(Fault(KVEnd, "drop", peer_of=worker))
        case "lose taken":
            script.faults.append(Fault(KVTaken, "drop", peer_of=worker))
        case "double pieces":
            script.faults.append(Fault(KVPieces, "duplicate", peer_of=worker))
        case "lose welcome":
            script.faults.append(Fault(PeerWelcome, "drop", count=3, peer_of=worker))
        case "late drop":
            script.faults.append(Fault(DropStage, "delay", delay_s=0.5, peer_of=worker))
        case _:
            setattr(worker, what, getattr(worker, what) + 1)


DISTURBANCES = [
    "cut links", "cut transfers", "apart", "together", "lose pieces", "lose end", "lose taken",
    "double pieces", "lose welcome", "late drop", "fail_exports", "fail_imports", "fail_assemblies",
]  # fmt: skip


@settings(max_examples=80, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_moves_never_hang_nor_change_a_token(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 3))
    script = Script(count, seed=data.draw(st.integers(0, 1000)))
    script.serve(data.draw(plans(count)))
    for worker in script.machines:
        worker.load_s = data.draw(st.sampled_from([0.01, 0.3]))
        worker.transfer_s = data.draw(st.sampled_from([0.0, 0.001, 0.01]))
        worker.max_positions = data.draw(st.sampled_from([4, 50]))
        worker.task_s = data.draw(st.sampled_from([0.02, 0.05]))
    script.generate(3)
    for epoch in range(2, 2 + data.draw(st.integers(1, 3))):
        for _ in range(data.draw(st.integers(0, 2))):
            what = data.draw(st.sampled_from(DISTURBANCES))
            ones = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
            after_s = data.draw(st.floats(0.0, 1.0))
            script.at(after_s, lambda what=what, ones=ones: disturb(script, what, *ones))  # type: ignore[misc]
        cancel_at = script.now + data.draw(st.one_of(st.just(1e9), st.floats(0.0, 1.5)))
        script.at_time(min(cancel_at, script.now + 1e6), lambda: None)
        script.try_to_move(epoch, data.draw(plans(count)), lambda at=cancel_at: script.now >= at)  # type: ignore[misc]
        script.generate(2)
    script.apart.clear()
    script.faults.clear()
    script.generate(3)
    script.pause()
    script.run(for_s=2.0)  # what is late arrives
    script.check()


def test_moves_that_nothing_disturbs_are_made() -> None:
    """Else the test above would test little."""
    halves = ((0, LayerRange(0, 3)), (1, LayerRange(3, 6)))
    others: list[Plan] = [
        ((0, LayerRange(0, 2)), (1, LayerRange(2, 6))),
        ((1, LayerRange(0, 6)),),
        ((2, LayerRange(0, 3)), (0, LayerRange(3, 4)), (1, LayerRange(4, 6))),
        ((1, LayerRange(0, 3)), (2, LayerRange(3, 6))),
    ]
    script = Script(3, seed=1)
    script.serve(halves)
    script.generate(5)
    for epoch, plan in enumerate(others, 2):
        computed = [one.computed for one in script.answers]
        assert script.try_to_move(epoch, plan, lambda: False)
        script.generate(3)
        assert all(one.computed > had for one, had in zip(script.answers, computed, strict=True))
    script.pause()
    script.run(for_s=2.0)
    script.check()
    assert script.num_lost == 0
