"""How long the layers take is measured, also where kernels run later than they are queued."""

from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_llm.worker.model import layer_hooks
from distributed_llm.worker.model.layer_hooks import ClockEvent, LayerHooks, StreamEvent, event_type


class Layer(nn.Module):
    """Adds one to its states; on a clock that is told, that takes a second."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self._clock = clock

    def forward(self, states: Tensor) -> Tensor:
        self._clock[0] += 1
        return states + 1


class QueueEvent:
    """An event of a device whose queue is reached only when somebody waits for it."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self._at_s: float | None = None
        self.reached = False

    def record(self) -> None:
        assert self._at_s is None, "an event of an older step is used again"
        self._at_s = self._clock[0]

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, other: Any) -> float:
        assert other.reached
        return float(other._at_s - self._at_s) * 1000


def hooks_on(layers: nn.ModuleList, **changes: Any) -> LayerHooks:
    settings: dict[str, Any] = {
        "first": True,
        "last": True,
        "new_event": ClockEvent,
        "after_layer": lambda: None,
    }
    return LayerHooks(layers, **(settings | changes))


def run(layers: nn.ModuleList, states: Tensor) -> Tensor:
    for layer in layers:
        states = layer(states)
    return states


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_all_layers_and_nothing_else_are_counted(
    monkeypatch: pytest.MonkeyPatch, count: int, first: bool, last: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(layer_hooks, "perf_counter", lambda: clock[0])
    layers = nn.ModuleList(Layer(clock) for _ in range(count))
    hooks = hooks_on(layers, first=first, last=last)
    for _ in range(2):
        clock[0] += 10
        hooks.incoming = torch.zeros(1)
        run(layers, torch.zeros(1))
        clock[0] += 20
        assert hooks.seconds == count


def test_layers_that_are_launched_at_once_count_by_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is recorded for that is neither timed nor progress."""
    clock, progress = [0.0], [0]

    def after_layer() -> None:
        progress[0] += 1

    monkeypatch.setattr(layer_hooks, "perf_counter", lambda: clock[0])
    layers = nn.ModuleList(Layer(clock) for _ in range(3))
    hooks = hooks_on(layers, after_layer=after_layer)
    hooks.recording = True
    run(layers, torch.zeros(1))
    hooks.recording = False
    assert (hooks.seconds, progress) == (0.0, [0])

    def launch() -> None:
        clock[0] += 8

    hooks.launch(launch, 0.75)
    assert (hooks.seconds, progress) == (6.0, [1])
    run(layers, torch.zeros(1))
    assert (hooks.seconds, progress) == (3.0, [4])


def test_a_run_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(layer_hooks, "perf_counter", lambda: clock[0])
    layers = nn.ModuleList(Layer(clock) for _ in range(3))
    failing = [False, False, False, True]

    def after_layer() -> None:
        if failing.pop(0):
            raise RuntimeError

    hooks = hooks_on(layers, after_layer=after_layer)
    run(layers, torch.zeros(1))
    with pytest.raises(RuntimeError):
        run(layers, torch.zeros(1))
    clock[0] += 5
    assert hooks.seconds == 3


def test_a_device_is_waited_for_only_when_the_time_is_asked_for() -> None:
    clock, made = [0.0], []

    def new_event() -> QueueEvent:
        made.append(QueueEvent(clock))
        return made[-1]

    layers = nn.ModuleList(Layer(clock) for _ in range(3))
    hooks = hooks_on(layers, new_event=new_event)
    for _ in range(2):
        run(layers, torch.zeros(1))
    assert not any(event.reached for event in made)
    assert hooks.seconds == 3


def test_it_costs_next_to_nothing() -> None:
    """Against the same hooks without the two that measure."""
    plain, timed = (nn.ModuleList([nn.Identity(), nn.Identity()]) for _ in range(2))
    hooks_on(timed)
    for layer in plain:
        layer.register_forward_hook(lambda *_: None)
    states = torch.zeros(1)

    def fastest(layers: nn.ModuleList) -> float:
        times = []
        for _ in range(300):
            began = perf_counter()
            run(layers, states)
            times.append(perf_counter() - began)
        return min(times)

    assert fastest(timed) - fastest(plain) < 20e-6


def test_events_are_those_of_the_device() -> None:
    assert event_type(torch.device("cpu")) is ClockEvent


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_kernels_of_a_gpu_are_timed() -> None:
    device = torch.device("cuda:0")
    began, ended = StreamEvent(torch.cuda, device), StreamEvent(torch.cuda, device)
    matrix = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    queued = perf_counter()
    began.record()
    for _ in range(50):
        matrix @ matrix
    ended.record()
    queued = perf_counter() - queued
    ended.synchronize()
    assert began.elapsed_time(ended) / 1000 > 2 * queued
