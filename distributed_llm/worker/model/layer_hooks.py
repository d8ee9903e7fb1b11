"""Hooks on a stage's layers: hidden states in and out, progress, and time taken."""

from collections.abc import Callable, Iterable
from time import perf_counter
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class LayerHooks:
    """Hooks on the layers of one stage.

    Args:
        layers: not empty; no other stage may run these modules.
        first: the layers are the model's first, so they take the embedding's output.
        entries: other layers that a step may begin with, and take the embedding's output.
        last: the layers are the model's last, so the model's own norm and head take their output.
        new_event: returns a new event of the layers' device; see `event_type`.
        after_layer: called after each layer. It must not refer to the layers: the cycle would keep
            their memory until the next garbage collection.

    Attributes:
        after_layer: as given; may be changed.
        incoming: [1, tokens, hidden_size], the input of the first layer, unless `first`.
        outgoing: [1, tokens, hidden_size], the output of the last layer, unless `last`.
        recording: what layers are asked is recorded, to be launched later; it is neither timed nor
            progress.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        *,
        first: bool,
        last: bool,
        new_event: Callable[[], "Event"],
        after_layer: Callable[[], None] | None,
        entries: Iterable[nn.Module] = (),
    ) -> None:
        self.incoming: Tensor | None = None
        self.outgoing: Tensor | None = None
        self._new_event = new_event
        self.after_layer = after_layer
        self.recording = False
        self._began = new_event()
        self._span = (self._began, self._began)
        self._share = 1.0
        for entry in (layers[0], *entries):
            entry.register_forward_pre_hook(self.begin)
        if not first:
            layers[0].register_forward_pre_hook(self._replace_input, with_kwargs=True)
        layers[-1].register_forward_hook(self.end)
        if not last:
            layers[-1].register_forward_hook(self._take_output)
        for layer in layers:
            layer.register_forward_hook(self.report_progress)

    @property
    def seconds(self) -> float:
        """Time that the layers took in the latest complete run.

        Waits until the device has finished them, which it has once a result was copied to the CPU.
        """
        began, ended = self._span
        ended.synchronize()
        return began.elapsed_time(ended) / 1000 * self._share

    def launch(self, layers: Callable[[], None], share: float) -> None:
        """Have all layers computed at once, and more beside them.

        Args:
            layers: computes them.
            share: of the time that this takes, what layers are taken to take.
        """
        self.begin()
        layers()
        self.end()
        self._share = share
        self.report_progress()

    def forget(self) -> None:
        """Drop the hidden states, so that their memory can be freed."""
        self.incoming = self.outgoing = None

    def begin(self, *_: Any) -> None:
        """Note that the layers begin."""
        if self.recording:
            return
        self._began = self._new_event()
        self._began.record()

    def end(self, *_: Any) -> None:
        """Note that the layers have ended."""
        if self.recording:
            return
        ended = self._new_event()
        ended.record()
        self._span, self._share = (self._began, ended), 1.0

    def report_progress(self, *_: Any) -> None:
        """Tell whoever wants to know that a layer has ended."""
        if self.after_layer is not None and not self.recording:
            self.after_layer()

    def _replace_input(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.incoming, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.incoming}

    def _take_output(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.outgoing = output[0] if isinstance(output, tuple | list) else output


class Event(Protocol):
    """A point in the queue of kernels of a device."""

    def record(self) -> None:
        """Set the point behind all kernels that are queued now."""

    def synchronize(self) -> None:
        """Wait until the device has reached the point."""

    def elapsed_time(self, other: Any) -> float:
        """Return the milliseconds from this event to `other`; both have been reached."""


class ClockEvent:
    """A point in time on a CPU, which queues no kernels."""

    __slots__ = ("_at_s",)

    def __init__(self) -> None:
        self._at_s = 0.0

    def record(self) -> None:
        """Set the point to the present."""
        self._at_s = perf_counter()

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, other: "ClockEvent") -> float:
        """Return the milliseconds from this event to `other`."""
        return (other._at_s - self._at_s) * 1000


class StreamEvent:
    """An event of one GPU, which need not be torch's current device.

    Args:
        backend: torch's module for this kind of GPU, `torch.cuda` or `torch.xpu`.
        device: the GPU.
    """

    __slots__ = ("_backend", "_device", "_event")

    def __init__(self, backend: ModuleType, device: torch.device) -> None:
        self._backend = backend
        self._device = device
        self._event = backend.Event(enable_timing=True)

    def record(self) -> None:
        """Set the point behind all kernels that are queued now."""
        self._event.record(self._backend.current_stream(self._device))

    def synchronize(self) -> None:
        """Wait until the device has reached the point."""
        self._event.synchronize()

    def elapsed_time(self, other: "StreamEvent") -> float:
        """Return the milliseconds from this event to `other`; both have been reached."""
        return float(self._event.elapsed_time(other._event))


def event_type(device: torch.device) -> Callable[[], Event]:
    """Return a factory of events that time the kernels of `device`."""
    match device.type:
        case "cuda":
            return lambda: StreamEvent(torch.cuda, device)
        case "xpu":
            return lambda: StreamEvent(torch.xpu, device)
        case "mps":
            return lambda: torch.mps.Event(enable_timing=True)
    return ClockEvent
