"""Random schedules of everything that can happen to a cluster, and what must hold in each."""

import random
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, get_args

import msgspec
import pytest

from distributed_llm.common.errors import DistributedLLMError, StageError, UnsupportedModel
from distributed_llm.common.messages import (
    ClientHello,
    ClientWelcome,
    DecodeTokens,
    DrainWorker,
    DropStage,
    Embed,
    Embedded,
    EncodePrompt,
    Finished,
    Generate,
    GetStatus,
    HandOver,
    PeerHello,
    PromptEncoded,
    RequestFailed,
    StageFailed,
    StatusReport,
    Task,
    TaskFailed,
    TaskResult,
    TokenChunk,
    TokensDecoded,
    UndoMove,
    WorkerDrained,
    WorkerHello,
    tag_of,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import Epoch
from distributed_llm.coordinator import events
from distributed_llm.coordinator.cluster.move import MoveState
from tests.unit.fake_client import Answer, SimClient, text_of
from tests.unit.fake_model import (
    AUTO_MODEL,
    BIG,
    CONTEXT,
    MODEL,
    NUM_LAYERS,
    POISON,
    with_sources,
    with_states,
    with_workspace,
)
from tests.unit.fake_worker import SimWorker
from tests.unit.random_schedule import any_of, between, coin, maybe, rule, run_schedule, several
from tests.unit.simulation import Fault, FaultKind, Message, Way, World, with_settings

_MAX_WORKERS = 7

_NO_ANSWER = "a client waits for the answer as long as its connection lives, which loses nothing"
_ITS_END = "the client tells from its connection, not from messages, that nothing more comes"
NEVER_LOST: dict[type[Message], str] = {
    ClientHello: _NO_ANSWER,
    ClientWelcome: _NO_ANSWER,
    Generate: _NO_ANSWER,
    Embed: _NO_ANSWER,
    EncodePrompt: _NO_ANSWER,
    DecodeTokens: _NO_ANSWER,
    TokenChunk: _ITS_END,
    Finished: _ITS_END,
    Embedded: _ITS_END,
    PromptEncoded: _ITS_END,
    TokensDecoded: _ITS_END,
    RequestFailed: _ITS_END,
    StatusReport: _ITS_END,
    WorkerDrained: _ITS_END,
}
"""Messages that are not lost, doubled or spoiled alone in schedules, and why not.

Nor does the transport lose one of the others while a connection lives: TCP does not, and whoever
has too much to send closes the connection. A lost message stands for one that its reader could not
use: one that came before it was welcomed, that a bug on the other side left out, or that is ignored
because of what came before it. Workers and coordinator have to get over each of them alone.
"""

FAULTY: list[type[Message]] = sorted(
    {kind for kind in get_args(Message) if kind not in NEVER_LOST}, key=tag_of
)
"""Messages that may be lost, doubled, late or spoiled."""

_FAULTS: list[FaultKind] = ["drop", "duplicate", "delay", "spoil"]
_ENDS_A_WORKER = (WorkerHello,)
"""Messages after which a worker ends if they cannot be read: it has another release."""

_LOAD_ERRORS = [*[None] * 5, StageError("cannot load"), UnsupportedModel("cannot be split")]
"""What some of the workers that join have against their layers."""

_PROMPTS = several(between(0, POISON - 1), 1, 24)
_INDEX = between(0, 1000)
_BACKGROUND_TOKENS = 240


class Cluster:
    """Faults at any moment; what must always hold is asserted after every event (`Checker`).

    Attributes:
        max_examples: schedules that are tried.
        replicas: pipelines that are wanted.
        memories: of workers that join.
        longest: answer that is asked for.
        settings_of_core: others.
        background: long answers that keep the stages busy from the beginning.
        calm: whether nothing but the loss of messages happens to workers.
        faulty: messages that may be lost, doubled or late.
        task_s: how long workers that join take for a task; 0 is as quickly as usual.
        load_s: how long some of them take to load.
        model: that is served.
    """

    background = 0
    task_s = 0.0
    load_s = 0.01
    calm = False
    model = with_workspace(MODEL)
    faulty: ClassVar[list[type[Message]]] = FAULTY
    replicas: int | Literal["auto"] = 1
    memories = (300, BIG, 1200)
    longest = 20
    max_examples = 32
    settings_of_core: ClassVar[Mapping[str, object]] = {}

    def __init__(self) -> None:
        self.num_errors = 0  # injected into the running of stages
        self.submitted: list[tuple[SimClient, Answer]] = []

    def start(self, draw: random.Random) -> None:
        """Let a few workers join, and two clients."""
        self.world = World(
            with_settings(max_waiting_requests=8, replicas=self.replicas, **self.settings_of_core),
            seed=draw.randrange(2**16),
            delay_s=(0.001, 0.3) if coin(draw) else (0.001, 0.002),
            text_delay_s=0.01 if coin(draw) else 0.0,
            model=self.model,
        )
        for _ in range(draw.randint(1, 4)):
            self.join(1, error=None, slow=False)
        self.busy = self.world.client()
        self.world.client()
        self.world.run(for_s=2.0)
        for number in range(self.background):
            params = SamplingParams(max_new_tokens=_BACKGROUND_TOKENS, ignore_eos=True)
            self.busy.submit([number, 1, 2], params)

    # -------------------------------------------------------------- people

    def up(self) -> list[SimWorker]:
        return [w for w in self.world.workers if w.state == "up"]

    def alive(self) -> list[SimWorker]:
        return [w for w in self.world.workers if w.state != "dead"]

    def any_up(self) -> bool:
        """Whether something may happen to a worker."""
        return bool(self.up()) and not self.calm

    @rule(
        when=lambda self: len(self.alive()) < _MAX_WORKERS,
        memory=between(0, 2),
        error=any_of(_LOAD_ERRORS),
        slow=coin,
    )
    def join(self, memory: int, error: DistributedLLMError | None, slow: bool) -> None:
        worker = self.world.worker(f"w{len(self.world.workers)}", self.memories[memory])
        worker.task_s = self.task_s or worker.task_s
        worker.load_s = self.load_s if slow else worker.load_s
        worker.load_error = error
        worker.fetches = len(self.world.workers) % 3 > 0

    @rule(
        prompt=_PROMPTS,
        length=_INDEX,
        seed=maybe(between(0, 3)),
        stop=maybe(between(0, 19)),
        n=any_of([1, 1, 1, 3]),
        like=maybe(_INDEX),
        timeout_s=any_of([None, None, 0.05, 1.0]),
        logprobs=any_of([None, None, 0, 3]),
        grammar=any_of(["", "", "1", "4", "12"]),
    )
    def submit(
        self,
        prompt: list[int],
        length: int,
        seed: int | None,
        stop: int | None,
        n: int,
        like: int | None,
        timeout_s: float | None,
        logprobs: int | None,
        grammar: str,
    ) -> None:
        prompt = self._begun(prompt, like)
        params = SamplingParams(
            max_new_tokens=1 + length % self.longest,
            seed=seed,
            n=n,
            timeout_s=timeout_s,
            logprobs=logprobs,
            trace=length % 2 == 1,
        )
        if stop is not None:
            encoders = self.model.cost.encoder_layers
            whole = Answer(
                tuple(prompt), params, grammar=grammar, encoder_layers=encoders
            ).expected()
            stops = (text_of([whole[stop % len(whole)]]), text_of([1, 2]))
            params = msgspec.structs.replace(params, stop_strings=stops)
        self._submit(prompt, params, grammar)

    @rule(prompt=_PROMPTS, like=maybe(_INDEX), timeout_s=any_of([None, None, 0.05, 1.0]))
    def embed(self, prompt: list[int], like: int | None, timeout_s: float | None) -> None:
        client = self._client()
        self.submitted.append((client, client.embed(self._begun(prompt, like), timeout_s)))

    @rule(prompt=_PROMPTS, at=_INDEX)
    def submit_poison(self, prompt: list[int], at: int) -> None:
        prompt[at % len(prompt)] = POISON
        self._submit(prompt, SamplingParams(max_new_tokens=4))

    def _begun(self, prompt: list[int], like: int | None) -> list[int]:
        """Return a prompt that begins like another one, or goes on from it, if that is drawn."""
        if like is None or not self.submitted:
            return prompt
        other = self.submitted[like % len(self.submitted)][1]
        return (
            prompt if POISON in other.prompt else [*other.prompt, *other.token_ids, *prompt][:200]
        )

    def _submit(self, prompt: list[int], params: SamplingParams, grammar: str = "") -> None:
        client = self._client()
        self.submitted.append((client, client.submit(prompt, params, grammar=grammar)))

    def _client(self) -> SimClient:
        """Return the client that came last, or a new one if all are gone."""
        here = [client for client in self.world.clients if not client.gone]
        return here[-1] if here else self.world.client()

    @rule(when=lambda self: self.submitted, index=_INDEX)
    def cancel(self, index: int) -> None:
        client, answer = self.submitted[index % len(self.submitted)]
        name = next(n for n, a in client.answers.items() if a is answer)
        client.cancel(name)

    @rule(silently=coin)
    def client_vanishes(self, silently: bool) -> None:
        self._client().vanish(silently=silently)
        self.world.client()

    @rule()
    def ask_for_status(self) -> None:
        self._client().say(GetStatus())

    # -------------------------------------------------------------- faults

    @rule(when=any_up, index=_INDEX, silently=coin, after_tasks=between(0, 6), late=coin)
    def kill(self, index: int, silently: bool, after_tasks: int, late: bool) -> None:
        worker = self._pick(index)
        self._after_tasks(worker, after_tasks, late, lambda: worker.kill(silently=silently))

    @rule(when=any_up, index=_INDEX, after_tasks=between(0, 6), late=coin)
    def freeze(self, index: int, after_tasks: int, late: bool) -> None:
        worker = self._pick(index)
        self._after_tasks(worker, after_tasks, late, worker.freeze)

    @rule(index=_INDEX)
    def thaw(self, index: int) -> None:
        frozen = [w for w in self.world.workers if w.state == "frozen"]
        if frozen:
            frozen[index % len(frozen)].thaw()

    @rule(when=any_up, index=_INDEX)
    def leave(self, index: int) -> None:
        self._pick(index).leave()

    @rule(when=any_up, index=_INDEX, hang=coin)
    def hang_or_resume(self, index: int, hang: bool) -> None:
        worker = self._pick(index)
        if hang:
            worker.hung = True
        elif worker.hung:
            worker.resume()

    @rule(when=any_up, index=_INDEX)
    def fail_a_task(self, index: int) -> None:
        self._pick(index).fail_tasks += 1
        self.num_errors += 1

    @rule(when=any_up, index=_INDEX)
    def lose_kv_cache(self, index: int) -> None:
        worker = self._pick(index)
        if worker.stage is not None:
            worker.stage.kv.clear()
            self.num_errors += 1

    @rule(when=any_up, index=_INDEX, other=_INDEX, apart=coin)
    def cut_a_link(self, index: int, other: int, apart: bool) -> None:
        worker, next_worker = self._pick(index), self._pick(other)
        if apart:
            self.world.apart.add((worker, next_worker))
        worker.cut()

    @rule(when=any_up, index=_INDEX, task_s=any_of([0.0005, 0.001, 0.02, 0.2]), per_token=coin)
    def change_speed(self, index: int, task_s: float, per_token: bool) -> None:
        worker = self._pick(index)
        worker.task_s, worker.token_s = task_s, task_s / 8 if per_token else 0.0
        worker.layer_s = 0.0 if per_token else task_s / 2

    @rule(when=any_up, index=_INDEX)
    def leave_kindly(self, index: int) -> None:
        self._pick(index).leave_kindly()

    @rule(when=any_up, index=_INDEX)
    def drain(self, index: int) -> None:
        self._client().say(DrainWorker(worker=self._pick(index).worker_id or "nobody"))

    @rule(
        when=any_up, index=_INDEX, what=any_of(["fail_exports", "fail_imports", "fail_assemblies"])
    )
    def fail_a_handover(self, index: int, what: str) -> None:
        setattr(self._pick(index), what, 1)

    @rule(
        index=_INDEX,
        what=any_of(_FAULTS),
        count=between(1, 2),
        delay_s=any_of([0.1, 2.0, 5.0]),
        across=coin,
    )
    def break_messages(
        self, index: int, what: FaultKind, count: int, delay_s: float, across: bool
    ) -> None:
        kind = self.faulty[index % len(self.faulty)]
        if what == "spoil":
            if kind in _ENDS_A_WORKER:
                return
            self.num_errors += count
        way: Way | None = "across" if across and kind in (Task, PeerHello) else None
        self.world.faults.append(Fault(kind, what, count, delay_s=delay_s, way=way))

    @rule(seconds=any_of([0.0, 0.002, 0.005, 0.02, 0.1, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(for_s=seconds)

    def _pick(self, index: int) -> SimWorker:
        return self.up()[index % len(self.up())]

    def _after_tasks(
        self, worker: SimWorker, count: int, late: bool, act: Callable[[], None]
    ) -> None:
        """Do `act` now, or when the worker has run `count` more tasks, before or after one."""
        if count == 0:
            act()
            return
        left = [count]

        def hook(task: Task) -> None:
            left[0] -= 1
            if left[0] == 0 and worker.state == "up":
                act()

        if late:
            worker.after_task = hook
        else:
            worker.before_task = hook

    # -------------------------------------------------------------- the end

    def finish(self) -> None:
        """Mend everything; then all must end well, and nothing be left."""
        world = self.world
        if not self.busy.gone:
            self.busy.vanish(silently=False)
        world.faults.clear()
        world.apart.clear()
        for worker in world.workers:
            worker.before_task = worker.after_task = lambda task: None
            worker.fail_tasks = worker.fail_exports = worker.fail_imports = 0
            worker.fail_assemblies = 0
            if worker.state == "frozen":
                worker.thaw()
            worker.resume()  # but loads that hang do so for good
        for i in range(2):
            world.worker(f"mender{i}", 2000)
        assert world.run(world.all_ended, for_s=600.0), "a request never ended"
        world.run(for_s=10.0)  # losses of just now are noticed
        assert world.run(lambda: world.state == "serving", for_s=200.0), "nothing is served"
        last = world.client().submit((1, 2, 3, 4))
        assert world.run(lambda: last.end is not None), "the last request never ended"
        assert last.finish_reason is not None, last.end
        for client, answer in self.submitted:
            answer_is_right(answer, client, self.num_errors)
        world.run(for_s=35.0)  # clients that vanished are forgotten, joiners are used
        assert world.run(lambda: world.state == "serving", for_s=200.0), "nothing is served"
        world.settle()
        world.check_drained()


def answer_is_right(answer: Answer, client: SimClient, num_errors: int) -> None:
    """Assert the tokens, and that a failure has a cause."""
    if POISON in answer.prompt:
        assert answer.finish_reason is None
        assert answer.token_ids == []
        return
    answer.check()
    if client.gone or answer.code == "":
        return
    causes = {"overloaded", "not_ready", "worker_lost", "not_enough_memory"}
    if answer.params.timeout_s is not None:
        causes.add("deadline_exceeded")
    if len(answer.prompt) + (answer.params.max_new_tokens or 0) > CONTEXT:
        causes.add("context_length_exceeded")
    if answer.cancelled:
        causes.add("cancelled")
    if answer.embeds and answer.encoder_layers:
        causes.add("invalid_request")
    if num_errors >= 2:
        causes.add("stage_error")
    assert answer.code in causes, answer.end


class TightCluster(Cluster):
    """Answers outgrow the room."""

    longest = 120
    memories = (300, 600, 850)


class CrowdedCluster(Cluster):
    """Few may run at the same time, in small steps."""

    settings_of_core: ClassVar = {"max_batch_sequences": 3, "max_batch_tokens": 4}


class TwinCluster(Cluster):
    """The model is served twice."""

    replicas = 2
    longest = 60
    memories = (400, 800, 1200)


class AutoCluster(Cluster):
    """Weights have fewer bits where the workers that are there cannot hold them otherwise."""

    model = with_workspace(AUTO_MODEL)
    longest = 60
    memories = (300, 450, 700)
    max_examples = 9
    num_forms: ClassVar[list[int]] = []

    def finish(self) -> None:
        """Also count the changes."""
        super().finish()
        self.num_forms.append(len(self.world.checker.forms))


class AutoTwins(AutoCluster):
    """Likewise, and the model is served twice."""

    replicas = 2
    memories = (400, 700, 1500)
    max_examples = 8
    num_forms: ClassVar[list[int]] = []


class MovingCluster(Cluster):
    """Layers move to where they are computed soonest."""

    longest = 120
    memories = (1500, 3000, 3000)
    settings_of_core: ClassVar = {"strategy": "speed"}
    max_examples = 16
    least_moves = 5
    num_moves: ClassVar[list[int]] = []

    @rule(cuts=several(between(1, NUM_LAYERS - 1), 0, 4), shift=between(0, 6))
    def move(self, cuts: list[int], shift: int) -> None:
        self.world.move(sorted(set(cuts)), shift)

    def finish(self) -> None:
        """Also count the moves."""
        super().finish()
        self.num_moves.append(self.world.core.status(now=self.world.now).moves)


class StatefulCluster(MovingCluster):
    """Layers keep states, from which alone computing goes on; and layers move."""

    model = with_workspace(with_states(MODEL))
    memories = (1500, 4000, 4000)
    least_moves = 2
    max_examples = 8
    least_shared = 200
    num_moves: ClassVar[list[int]] = []
    num_shared: ClassVar[list[int]] = []

    @rule(
        begin=between(0, 1),
        cut=any_of([0, 0, 1, 2, 5, 30]),
        more=several(between(0, POISON - 1), 1, 6),
        times=between(1, 4),
        wait_s=any_of([0.0, 0.05, 0.5]),
    )
    def converse(self, begin: int, cut: int, more: list[int], times: int, wait_s: float) -> None:
        """Go on from about the end of the latest text that begins like this, some times at once."""
        text = [(begin + 7 * i) % POISON for i in range(80)]
        for _, other in self.submitted:
            if list(other.prompt[: len(text)]) == text[: len(other.prompt)]:
                text = [*other.prompt, *other.token_ids]
        text = text[: 130 - cut]
        params = SamplingParams(max_new_tokens=20, ignore_eos=True)
        for number in range(times):
            self._submit([*text[: len(text) - cut], *more, number], params)
            self.world.run(for_s=wait_s)

    @rule(
        begin=between(0, 1),
        cuts=several(between(1, NUM_LAYERS - 1), 0, 4),
        shift=between(0, 6),
        loses=coin,
    )
    def move_while_they_converse(
        self, begin: int, cuts: list[int], shift: int, loses: bool
    ) -> None:
        """Have layers move among answers; maybe the last steps before the handover are lost."""
        self.converse(begin, 0, [1, 2, 3], 2, 0.05)
        self.world.move(sorted(set(cuts)), shift)
        if loses and self.world.run(self._waits_for_steps, for_s=1.0):
            for worker in self.up():
                worker.cut()
        self.world.run(for_s=1.0)

    def _waits_for_steps(self) -> bool:
        move = self.world.core._moves.move
        return move is not None and move.state is MoveState.FINISHING_STEPS

    def finish(self) -> None:
        """Also count the tokens that were shared instead of computed."""
        super().finish()
        self.num_shared.append(self.world.core.status(now=self.world.now).prefix_hit_tokens)


class SourcesCluster(MovingCluster):
    """An encoder reads prompts, some of them again or up to a point, and layers move."""

    model = with_workspace(with_sources(MODEL))
    max_examples = 9
    least_shared = 200
    num_shared: ClassVar[list[int]] = []
    least_moves = 2
    num_moves: ClassVar[list[int]] = []

    @rule(
        cut=any_of([0, 0, 1, 5, 30]),
        more=several(between(0, POISON - 1), 0, 2),
        times=between(1, 3),
        wait_s=any_of([0.0, 0.05, 2.0]),
    )
    def ask_alike(self, cut: int, more: list[int], times: int, wait_s: float) -> None:
        """Ask some times at once for what begins like what others ask."""
        source = [*((7 * i) % POISON for i in range(80 - cut)), *more]
        for _ in range(times):
            self._submit(source, SamplingParams(max_new_tokens=10, ignore_eos=True))
            self.world.run(for_s=wait_s)

    def finish(self) -> None:
        """Also count the tokens that were shared instead of computed."""
        super().finish()
        self.num_shared.append(self.world.core.status(now=self.world.now).prefix_hit_tokens)


class SlowSources(SourcesCluster):
    """Sources are slow on their way, and overtaken by answers that need the room that they free."""

    calm = True
    memories = (900, 900, 900)
    faulty: ClassVar[list[type[Message]]] = [Task, TaskResult]
    settings_of_core: ClassVar = {"strategy": "even", "min_workers": 2}
    max_examples = 2
    least_moves = 0
    least_shared = 0
    num_moves: ClassVar[list[int]] = []
    num_shared: ClassVar[list[int]] = []

    def start(self, draw: random.Random) -> None:
        """Let the worker that was there first be slow."""
        super().start(draw)
        self.join(0, error=None, slow=False)
        self.world.workers[0].task_s = 0.4
        self.world.run(for_s=1.0)

    @rule(
        kept=between(1, 3),
        growing=between(2, 4),
        length=between(1, 64),
        quick=between(2, 4),
        wait_s=any_of([0.05, 0.2, 0.5]),
    )
    def sources_come_while_answers_grow(
        self, kept: int, growing: int, length: int, quick: int, wait_s: float
    ) -> None:
        """What long texts have left goes for short ones, and for answers that grow meanwhile."""
        for _ in range(kept):
            self._ask_anew(70, 60)
        self.world.run(for_s=30.0)
        for number in range(growing):
            self._ask_anew((length + 17 * number) % 64, 90)
        self.world.run(for_s=0.5)
        for _ in range(quick):
            self._ask_anew(5, 1)
            self.world.run(for_s=wait_s)
        self.world.run(for_s=20.0)

    def _ask_anew(self, length: int, new_tokens: int) -> None:
        """Ask for a text that begins like no other."""
        number = len(self.submitted)
        text = [(3 * number + 7 * i) % POISON for i in range(length)]
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        self._submit([number % POISON, number // POISON, *text], params)


class StatefulMoves(StatefulCluster):
    """Layers with states move again and again; steps are lost, and no worker is."""

    calm = True
    faulty: ClassVar[list[type[Message]]] = [Task, TaskResult]
    task_s = 0.02
    max_examples = 4
    least_moves = 6
    num_moves: ClassVar[list[int]] = []
    num_shared: ClassVar[list[int]] = []

    def client_vanishes(self, silently: bool) -> None:
        """No client does: what nobody waits for would keep others waiting here."""


class MovingTwins(MovingCluster):
    """Likewise, and the model is served as often as is fastest."""

    replicas = "auto"
    num_moves: ClassVar[list[int]] = []


class MovingAuto(AutoCluster, MovingCluster):
    """Weights change, and layers move."""

    settings_of_core: ClassVar = {"strategy": "speed"}
    max_examples = 8
    least_moves = 1
    num_forms: ClassVar[list[int]] = []
    num_moves: ClassVar[list[int]] = []


class BusyCluster(MovingCluster):
    """Answers that go on and on, in steps that take long: what is lost is not all there is."""

    background = 8
    task_s = 0.2
    calm = True
    faulty: ClassVar[list[type[Message]]] = [
        Task,
        TaskResult,
        TaskFailed,
        HandOver,
        UndoMove,
        DropStage,
    ]
    memories = (3000, 3000, 3000)
    settings_of_core: ClassVar = {"strategy": "speed", "max_batch_sequences": 8}
    max_examples = 5
    num_moves: ClassVar[list[int]] = []

    @rule()
    def much_time_passes(self) -> None:
        self.world.run(for_s=20.0)


class SlowCluster(Cluster):
    """Some workers take long to load, much time passes, and nobody is lost."""

    load_s = 30.0
    calm = True

    @rule()
    def much_time_passes(self) -> None:
        self.world.run(for_s=20.0)


class SlowTwins(SlowCluster):
    """The model is served twice, by pipelines of unequal room, one of which may load for long."""

    replicas = 2
    longest = 150
    memories = (400, 800, 5000)
    max_examples = 11


class SlowMoves(SlowCluster, MovingCluster):
    """Layers move, slowly, where memory holds hardly more than both stages."""

    memories = (800, 1000, 1300)
    max_examples = 10
    least_moves = 3
    num_moves: ClassVar[list[int]] = []

    @rule(cuts=several(between(1, NUM_LAYERS - 1), 0, 4), shift=between(0, 6))
    def move(self, cuts: list[int], shift: int) -> None:
        """Let layers take long to load that were loaded fast."""
        for worker in self.up():
            worker.load_s = self.load_s
        super().move(cuts, shift)

    def is_moving(self) -> bool:
        """Whether a move takes room."""
        return self.world.core._moves.move is not None

    @rule(when=is_moving, prompt=_PROMPTS, less=between(0, 60))
    def ask_for_the_room_that_a_move_takes(self, prompt: list[int], less: int) -> None:
        """An answer may outgrow the room that the move leaves, but not the room without it."""
        room = min(self.world.core._pipelines.kv_tokens, CONTEXT)
        new_tokens = max(1, room - len(prompt) - less)
        self._submit(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))


class ManyAtOnce(Cluster):
    """More answers run than fit a step."""

    background = 7
    longest = 60
    memories = (6000, 6000, 6000)
    settings_of_core: ClassVar = {"max_batch_sequences": 12, "max_batch_tokens": 2}
    max_examples = 9


class FailingLoads(Cluster):
    """Loads fail or hang, also of stages that are served, and machines lose power."""

    settings_of_core: ClassVar[Mapping[str, object]] = {"load_timeout_s": 10.0}
    max_examples = 26

    @rule(when=Cluster.any_up, index=_INDEX, how=any_of(["well", "fail", "refuse", "stall"]))
    def change_loads(self, index: int, how: str) -> None:
        worker = self._pick(index)
        errors = {"fail": StageError("cannot load now"), "refuse": UnsupportedModel("no layers")}
        worker.load_error = errors.get(how)
        if how == "stall":
            worker.load_stalls = True
        else:
            worker.resume_loads()

    @rule(when=Cluster.any_up, index=_INDEX)
    def fail_a_stage(self, index: int) -> None:
        worker = self._pick(index)
        if not self.world.core._registry.knows(worker.link.peer):
            return  # nobody reports before it is welcomed
        failed = StageFailed(epoch=Epoch(worker.epoch), code="stage_error", message="it broke")
        self.world.apply(events.Received(worker.link.peer, failed))

    @rule(
        when=lambda self: bool(self.up()) and len(self.alive()) < _MAX_WORKERS,
        index=_INDEX,
        memory=between(0, 2),
    )
    def lose_power(self, index: int, memory: int) -> None:
        """The machine is back at once, and its old session is not known to be lost."""
        worker = self._pick(index)
        worker.kill(silently=True)
        self.world.worker(worker.name, self.memories[memory])


class FailingMoves(FailingLoads, MovingCluster):
    """Likewise, and layers move."""

    settings_of_core: ClassVar = {"strategy": "speed", "load_timeout_s": 10.0}
    max_examples = 14
    least_moves = 3
    num_moves: ClassVar[list[int]] = []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "cluster",
    [
        Cluster,
        TightCluster,
        CrowdedCluster,
        TwinCluster,
        MovingCluster,
        StatefulCluster,
        SourcesCluster,
        SlowSources,
        StatefulMoves,
        MovingTwins,
        AutoCluster,
        AutoTwins,
        MovingAuto,
        FailingLoads,
        FailingMoves,
        BusyCluster,
        SlowTwins,
        SlowMoves,
        ManyAtOnce,
    ],
)
def test_random_schedules(cluster: type[Cluster], pytestconfig: pytest.Config) -> None:
    many = pytestconfig.getoption("--schedules")
    first = random.randrange(2**48) if many else 0
    for seed in range(first, first + (many or cluster.max_examples)):
        run_schedule(cluster, seed)
    if issubclass(cluster, MovingCluster):
        assert sum(cluster.num_moves) >= cluster.least_moves, "hardly any layers moved"
    if issubclass(cluster, StatefulCluster | SourcesCluster):
        assert sum(cluster.num_shared) >= cluster.least_shared, "hardly anything was shared"
    if issubclass(cluster, AutoCluster):
        changes = sum(cluster.num_forms) - len(cluster.num_forms)
        assert changes >= cluster.max_examples // 4, "hardly any weights changed"


def test_every_kind_of_message_is_lost_alone_or_said_to_be_never_lost() -> None:
    assert NEVER_LOST.keys() <= set(get_args(Message))
    assert {*FAULTY, *NEVER_LOST} == set(get_args(Message))
    assert not set(FAULTY) & NEVER_LOST.keys()
