"""The latest events, kept as facts from which texts are made for people. Pure.

An event has a kind, the worker, request and plan that it concerns, and the numbers that belong to
it. Its text is made here and nowhere else, from the template of its kind. What happens again is
counted, and where there are too many events, the kind that has most gives one up: whatever happens
all the time pushes nothing else out. `EventLog.story` returns the events of one request or one
worker, for post-mortems.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from string import Formatter
from typing import Any, Literal

from distributed_llm.common.types import Epoch, WorkerId
from distributed_llm.common.wording import (
    count_text,
    duration_text,
    layer_map_text,
    layers_text,
    size_text,
)
from distributed_llm.coordinator.events import Log

MAX_EVENTS = 50
"""Events of the cluster that are kept, and shown by `dllm status`."""

MAX_REQUEST_EVENTS = 2048
"""Events of requests that are kept, for `EventLog.story`."""

_MAX_CHARS = 1000
"""Characters of an event's text; the rest is cut off."""

Level = Literal["info", "warning", "error"]


class EventKind(Enum):
    """Kinds of events, each with its level and the template of its text.

    The fields of a template are the facts of the event. A format after the colon makes words of a
    fact, with `common.wording`: `size` of bytes, `time` of seconds, `tokens`, `answers` and
    `pipelines` of a count, `layers` of a layer range, `map` of a layer map, `stall` of what a move
    cost, and `because` of a reason that may be empty.
    """

    PARAMETERS_NOT_FOLLOWED = (
        "warning",
        "the model's settings of generation have {names}, which is not followed here: answers may "
        "differ from those of transformers",
    )
    WORKER_JOINED = "info", "worker {worker} joined: {memory_bytes:size} on {device}"
    WORKER_RENAMED = "info", "worker {earlier} is called {worker} now: that name is free again"
    WORKER_LEFT = "info", "worker {worker} {why}"
    WORKER_LOST = "warning", "worker {worker} {why}"
    NOT_UNDERSTOOD = "warning", "worker {worker} cannot read a message to it ({what}): {why}"
    LINK_DIRECT = (
        "info",
        "worker {worker} sends its results to the next one directly ({rtt_s:time})",
    )
    LINK_RELAYED = (
        "info",
        "worker {worker} does not reach the next worker; its results go through the coordinator",
    )
    PLAN_LOADING = "info", "loading plan {epoch}: {layer_map:map}"
    WEIGHTS_QUANTIZED = (
        "info",
        "weights of plan {epoch} become {form} while they are loaded, because the workers cannot "
        "hold more: {nbytes:size} instead of {full:size}, and answers differ a little",
    )
    LAYERS_IN_RAM = (
        "warning",
        "plan {epoch} does not fit on its GPUs: {nbytes:size} of its weights stay in the memory of "
        "the machines of {workers} and are copied in every step, which takes about {read_s:time}",
    )
    LAYERS_ON_DISK = (
        "warning",
        "plan {epoch} does not fit into memory: {nbytes:size} of its weights stay on the disk of "
        "{workers} and are read in every step, which takes about {read_s:time}",
    )
    WEIGHTS_CHANGED = (
        "warning",
        "weights of plan {epoch} are {form} ({nbytes:size}), until now {earlier_form} "
        "({full:size}), because other workers are there; requests that run keep their "
        "tokens so far, and go on with these weights",
    )
    PLAN_KEPT = "warning", "layers stay as they are: {why}"
    STAGE_LOADED = "info", "worker {worker} loaded {layers:layers} in {load_s:time}"
    WEIGHTS_FETCHED = (
        "info",
        "worker {worker} got {fetched_bytes:size} of weights from other machines, for which it "
        "waited {fetch_s:time}",
    )
    STAGE_FAILED = "error", "worker {worker} cannot serve: {why}"
    WORKER_TRIED_AGAIN = "info", "worker {worker} may be given layers again"
    PLAN_SERVING = (
        "info",
        "serving plan {epoch}, with room for {room}",
    )
    PIPELINE_LOST = (
        "warning",
        "worker {worker} serves its layers no longer; the model is still served by "
        "{pipelines:pipelines}{why:because}",
    )
    WAITING = "warning", "waiting: {why}"
    STEPS_STUCK = "warning", "plan {epoch}: no progress; its steps are computed again"
    MOVE_BEGAN = (
        "info",
        "moving to plan {epoch}: {layer_map:map}; until now {before:map}{how}; because {why}",
    )
    PLAN_REPLACED = (
        "info",
        "plan {epoch} ends, and another one is loaded in its place, because {why}",
    )
    MOVE_UNDONE = (
        "warning",
        "plan {epoch} is given up, layers stay as they are; the move was undone: {why}",
    )
    MOVE_COMMITTED = (
        "info",
        "serving plan {epoch}: layers moved in {took_s:time}{stood_still:stall}",
    )
    DRAIN_REQUESTED = "info", "a client wants worker {worker} to leave"
    LEAVE_REQUESTED = "info", "worker {worker} wants to leave"
    NOBODY_TAKES_LAYERS = "warning", "worker {worker} cannot hand its layers over: {why}"
    WORKER_LEFT_OUT = "info", "worker {worker} has no layers: {why}"
    QUARANTINED = (
        "warning",
        "machine {machine} is quarantined for {pause_s:time}: it broke the protocol again and "
        "again; the last time, it {why}",
    )
    READMITTED = "info", "machine {machine} may connect again after its quarantine"
    SESSION_ENDED = (
        "warning",
        "the session of a peer was ended: it broke the protocol again and again; the last "
        "time, it {why}",
    )
    ENROLLED = "info", "machine {machine} is enrolled as {role}"
    STALLED = (
        "warning",
        "the coordinator stood still for {stall_s:time}, as if its machine slept or had too much "
        "to do; nobody is taken for lost because of that",
    )
    REQUEST_ARRIVED = "info", "request {request} arrived: {answers:answers}"
    REQUEST_QUEUED = "info", "request {request} has a prompt of {prompt_tokens:tokens}"
    ANSWER_ADMITTED = "info", "request {request}: answer {choice} runs on plan {epoch}"
    ANSWER_PREEMPTED = "info", "request {request}: answer {choice} gave its KV cache up"
    STEP_FAILED = "warning", "request {request}: worker {worker} failed a step ({code}): {why}"
    STEP_LOST = "warning", "request {request}: worker {worker} was lost over a step"
    CLIENT_GONE = "info", "request {request}: its client is gone"
    REQUEST_FINISHED = "info", "request {request} finished: {answer_tokens:tokens}"
    REQUEST_CANCELLED = "info", "request {request} was cancelled by its client"
    REQUEST_FAILED = "warning", "request {request} failed: {code}: {why}"

    @property
    def level(self) -> Level:
        """The level at which it is logged."""
        return self.value[0]

    @property
    def template(self) -> str:
        """Its text, with the names of facts in braces."""
        return self.value[1]


@dataclass(frozen=True)
class Entry:
    """One event.

    Attributes:
        at: when it happened last, clock seconds.
        worker: the worker that it concerns, if any.
        request: the client's id of the request that it concerns, if any.
        epoch: of the plan that it concerns, if any.
        facts: the other fields of its template, by name.
        times: how often it happened.
        number: counts all events of the cluster from 1; 0 for those of requests.
        encoder_layers: of the model, whose layers its text may name; 0: it is a decoder alone.
    """

    at: float
    kind: EventKind
    worker: WorkerId | None = None
    request: str | None = None
    epoch: Epoch | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    times: int = 1
    number: int = 0
    encoder_layers: int = 0

    @cached_property
    def text(self) -> str:
        """What happened, for people; every status repeats it."""
        known = {"worker": self.worker, "request": self.request, "epoch": self.epoch}
        formatter = _Formatter(self.encoder_layers)
        return formatter.format(self.kind.template, **known, **self.facts)[:_MAX_CHARS]

    def is_again(self, earlier: "Entry") -> bool:
        """Return whether it is what happened earlier, with the same facts."""
        return self == replace(earlier, at=self.at, times=self.times, number=self.number)

    def concerns(self, worker: str) -> bool:
        """Return whether a worker has a part in it."""
        maps = (value for name, value in self.facts.items() if name in ("layer_map", "before"))
        if worker in (self.worker, self.facts.get("earlier")):
            return True
        return any(worker == name for map_ in maps for name, _ in map_)


class _Formatter(Formatter):
    """str.format with the formats of `EventKind`.

    Args:
        encoder_layers: see `Entry`.
    """

    def __init__(self, encoder_layers: int) -> None:
        self._encoder_layers = encoder_layers

    def format_field(self, value: Any, format_spec: str) -> str:
        if of_layers := _OF_LAYERS.get(format_spec):
            return of_layers(value, self._encoder_layers)
        words = _FORMATS.get(format_spec)
        return words(value) if words else format(value, format_spec)


def _stall_text(stood_still: tuple[float, float] | None) -> str:
    """Return for how long steps stood still, and how much of it the handover took, seconds."""
    if stood_still is None:
        return ""
    stall_s, handover_s = stood_still
    handover = duration_text(handover_s)
    return f"; requests stood still for {duration_text(stall_s)}, {handover} of it to hand over"


_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "size": size_text,
    "time": duration_text,
    "tokens": lambda count: count_text(count, "token"),
    "answers": lambda count: count_text(count, "answer"),
    "pipelines": lambda count: count_text(count, "pipeline"),
    "stall": _stall_text,
    "because": lambda why: f" ({why})" if why else "",
}

_OF_LAYERS: Mapping[str, Callable[[Any, int], str]] = {
    "layers": layers_text,
    "map": layer_map_text,
}


class EventLog:
    """The latest events of one coordinator, a bounded number.

    Args:
        encoder_layers: see `Entry`.

    Attributes:
        now: when the core was last called, clock seconds; the time of new events.
        rejected: number of messages that were dropped, by reason; the reasons are a closed set.
        counts: number of all events so far, of the cluster and of requests, by kind.
    """

    def __init__(self, encoder_layers: int = 0) -> None:
        self._encoder_layers = encoder_layers
        self._cluster: list[Entry] = []
        self._requests: deque[Entry] = deque(maxlen=MAX_REQUEST_EVENTS)
        self.now = 0.0
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[EventKind] = Counter()
        self._number = 0

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The latest events of the cluster, oldest first; those that happened again by that."""
        return tuple(self._cluster)

    def note(
        self,
        kind: EventKind,
        *,
        worker: WorkerId | None = None,
        epoch: Epoch | None = None,
        **facts: Any,
    ) -> Log:
        """Keep an event of the cluster; return the action that logs it."""
        self.counts[kind] += 1
        self._number += 1
        entry = Entry(
            *(self.now, kind, worker, None, epoch, facts),
            number=self._number,
            encoder_layers=self._encoder_layers,
        )
        self._keep(entry)
        return Log(entry.text, kind.level, kind.name.lower().replace("_", " "))

    def _keep(self, entry: Entry) -> None:
        earlier = next((known for known in self._cluster if entry.is_again(known)), None)
        if earlier:
            self._cluster.remove(earlier)
            entry = replace(entry, times=earlier.times + 1)
        self._cluster.append(entry)
        if len(self._cluster) > MAX_EVENTS:
            counts = Counter(known.kind for known in self._cluster)
            crowded = max(counts.values())
            oldest = next(known for known in self._cluster if counts[known.kind] == crowded)
            self._cluster.remove(oldest)

    def trace(
        self,
        kind: EventKind,
        request: str,
        *,
        worker: WorkerId | None = None,
        epoch: Epoch | None = None,
        **facts: Any,
    ) -> None:
        """Keep an event of a request, which `story` returns and `dllm status` does not show."""
        self.counts[kind] += 1
        self._requests.append(Entry(self.now, kind, worker, request, epoch, facts))

    def story(self, *, request: str | None = None, worker: str | None = None) -> list[Entry]:
        """Return the events kept of one request or of one worker, oldest first."""
        story = [
            entry
            for entry in (*self._cluster, *self._requests)
            if (request is not None and entry.request == request)
            or (worker is not None and entry.concerns(worker))
        ]
        return sorted(story, key=lambda entry: entry.at)
