"""The latest events, kept as facts from which texts are made for people. Pure.

An event has a kind, the worker, request and plan that it concerns, and the numbers that belong to
it. Its text is made here and nowhere else, from the template of its kind. `EventLog.story` returns
the events of one request or one worker, for post-mortems.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from string import Formatter
from typing import Any, Literal

from distributed_llm.common.types import Epoch, WorkerId, size_text
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

    The fields of a template are the facts of the event. The formats `size` and `ms` write bytes
    and seconds in units that people read, `layers` a layer map.
    """

    WORKER_JOINED = "info", "worker {worker} joined: {memory_bytes:size} on {device}"
    WORKER_RENAMED = "info", "worker {earlier} is called {worker} now: that name is free again"
    WORKER_LEFT = "info", "worker {worker} {why}"
    WORKER_LOST = "warning", "worker {worker} {why}"
    LINK_DIRECT = "info", "worker {worker} hands its results on itself ({rtt_s:.1ms} ms)"
    LINK_RELAYED = (
        "info",
        "worker {worker} does not reach the next worker; its results go through the coordinator",
    )
    PLAN_LOADING = "info", "plan {epoch}: layers {layer_map:layers}"
    PLAN_KEPT = "warning", "the plan stays: {why}"
    STAGE_LOADED = "info", "worker {worker} loaded layers {layers} in {load_s:.1f} s"
    STAGE_FAILED = "error", "worker {worker} cannot serve: {why}"
    WORKER_TRIED_AGAIN = "info", "worker {worker} may be given layers again"
    PLAN_SERVING = "info", "serving plan {epoch}: {kv_tokens} positions of KV cache"
    PIPELINE_LOST = "warning", "{pipelines} pipelines are left to serve the model: {why}"
    WAITING = "warning", "waiting: {why}"
    STEPS_STUCK = "warning", "plan {epoch}: no progress; its steps are computed again"
    MOVE_BEGAN = (
        "info",
        "plan {epoch}: moving to {layer_map:layers} from {before:layers}{how}: {why}",
    )
    PLAN_REPLACED = (
        "info",
        "plan {epoch} ends, and another one is loaded in its place: {why}",
    )
    MOVE_UNDONE = (
        "warning",
        "plan {epoch}: layers stay as they are; the move was undone: {why}",
    )
    MOVE_COMMITTED = (
        "info",
        "plan {epoch} is served: layers moved in {took_s:.1f} s, steps stood still for "
        "{stall_s:ms} ms, of which {handover_s:ms} ms to hand over",
    )
    DRAIN_REQUESTED = "info", "a client wants worker {worker} to leave"
    LEAVE_REQUESTED = "info", "worker {worker} wants to leave"
    HANDOVER_IMPOSSIBLE = "warning", "worker {worker} cannot hand its layers over: {why}"
    WORKER_LEFT_OUT = "info", "worker {worker} has no layers: {why}"
    REQUEST_ARRIVED = "info", "request {request} arrived: {answers} answers"
    REQUEST_QUEUED = "info", "request {request} has {prompt_tokens} tokens of prompt"
    ANSWER_ADMITTED = "info", "request {request}: answer {choice} runs on plan {epoch}"
    ANSWER_PREEMPTED = "info", "request {request}: answer {choice} gave its KV cache up"
    STEP_FAILED = "warning", "request {request}: worker {worker} failed a step ({code}): {why}"
    STEP_LOST = "warning", "request {request}: worker {worker} was lost over a step"
    CLIENT_GONE = "info", "request {request}: its client is gone"
    REQUEST_FINISHED = "info", "request {request} finished: {answer_tokens} tokens"
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
        at: clock seconds.
        worker: the worker that it concerns, if any.
        request: the client's id of the request that it concerns, if any.
        epoch: of the plan that it concerns, if any.
        facts: the other fields of its template, by name.
    """

    at: float
    kind: EventKind
    worker: WorkerId | None = None
    request: str | None = None
    epoch: Epoch | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What happened, for people."""
        known = {"worker": self.worker, "request": self.request, "epoch": self.epoch}
        return _FORMATTER.format(self.kind.template, **known, **self.facts)[:_MAX_CHARS]

    def concerns(self, worker: str) -> bool:
        """Return whether a worker has a part in it."""
        maps = (value for name, value in self.facts.items() if name in ("layer_map", "before"))
        if worker in (self.worker, self.facts.get("earlier")):
            return True
        return any(worker == name for map_ in maps for name, _ in map_)


class _Formatter(Formatter):
    """str.format with the formats `size`, `ms` and `layers` of `EventKind`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        match format_spec:
            case "size":
                return size_text(value)
            case "ms" | ".1ms":
                return format(1000 * value, ".1f" if format_spec == ".1ms" else ".0f")
            case "layers":
                return ", ".join(f"{worker} {layers}" for worker, layers in value)
            case _:
                return format(value, format_spec)


_FORMATTER = _Formatter()


class EventLog:
    """The latest events of one coordinator, a bounded number.

    Attributes:
        now: when the core was last called, clock seconds; the time of new events.
        rejected: number of messages that were dropped, by reason; the reasons are a closed set.
    """

    def __init__(self) -> None:
        self._cluster: deque[Entry] = deque(maxlen=MAX_EVENTS)
        self._requests: deque[Entry] = deque(maxlen=MAX_REQUEST_EVENTS)
        self.now = 0.0
        self.rejected: Counter[str] = Counter()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The latest events of the cluster, oldest first."""
        return tuple(self._cluster)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of `entries`."""
        return tuple(entry.text for entry in self._cluster)

    def note(
        self,
        kind: EventKind,
        *,
        worker: WorkerId | None = None,
        epoch: Epoch | None = None,
        **facts: Any,
    ) -> Log:
        """Keep an event of the cluster; return the action that logs it."""
        entry = Entry(self.now, kind, worker, None, epoch, facts)
        self._cluster.append(entry)
        return Log(entry.text, kind.level, kind.name.lower().replace("_", " "))

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
