"""In which order the compute thread is given what waits for it."""

import queue
from types import SimpleNamespace

import pytest

from distributed_llm.common.messages import SequenceSlice, Task
from distributed_llm.common.types import Epoch, LayerRange, SequenceId, StepNumber
from distributed_llm.worker.compute import orders as orders_module
from distributed_llm.worker.compute.orders import OrderQueue
from distributed_llm.worker.session.events import Drop, ExportKV, Run, Serve

SLICES = (SequenceSlice(sequence_id=SequenceId(1), start=0, num_tokens=1),)


def run(step: int) -> Run:
    return Run(
        0,
        Task(
            epoch=Epoch(1),
            step=StepNumber(step),
            oldest=StepNumber(0),
            sequences=SLICES,
            tensors=(),
        ),
        (),
    )


def export(number: int) -> ExportKV:
    return ExportKV(session=0, epoch=Epoch(2), layers=LayerRange(0, 1), number=number, rest=False)


def filled(*orders: object) -> "OrderQueue[object]":
    queued: OrderQueue[object] = OrderQueue()
    for order in orders:
        queued.put(order)
    return queued


def rest(orders: "OrderQueue[object]") -> list[object]:
    """Return what is there, in the order in which it is given out."""
    given: list[object] = []
    while True:
        try:
            item = orders.get(block=False)
        except queue.Empty:
            return given
        assert item is not None
        given.append(item[1])


def test_first_come_first_served() -> None:
    orders = [run(1), Drop(), run(2), Serve(Epoch(3))]
    assert rest(filled(*orders)) == orders


def test_kv_cache_goes_before_waiting_tasks() -> None:
    assert rest(filled(run(1), run(2), export(1))) == [export(1), run(1), run(2)]


def test_tasks_go_on_between_much_kv_cache() -> None:
    """Four pieces, a task, four pieces, a task; the last ones when their turn has come."""
    exports = [export(number) for number in range(10)]
    given = rest(filled(run(1), run(2), run(3), *exports))
    assert given == [*exports[:4], run(1), *exports[4:8], run(2), *exports[8:], run(3)]


def test_without_tasks_nothing_waits() -> None:
    exports = [export(number) for number in range(10)]
    assert rest(filled(*exports)) == exports


def test_the_end_comes_after_all() -> None:
    orders = filled(run(1), export(1), run(2))
    orders.end()
    given = []
    while (item := orders.get()) is not None:
        given.append(item[1])
    assert given == [export(1), run(1), run(2)]


def test_an_order_that_comes_after_the_end_does_not_hide_it() -> None:
    """As when a load in the background ends while the engine is being stopped."""
    orders = filled(run(1))
    orders.end()
    orders.put(run(2))
    given = [orders.get(block=False) for _ in range(3)]
    assert [item and item[1] for item in given] == [run(1), run(2), None]


def test_an_empty_queue_says_so() -> None:
    orders = filled(export(1))
    assert rest(orders) == [export(1)]
    with pytest.raises(queue.Empty):
        orders.get(block=False)


def test_the_time_of_arrival_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((5.0, 7.0, 8.0))
    monkeypatch.setattr(orders_module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    orders = filled(run(1), export(1), run(2))
    given = [orders.get(), orders.get(), orders.get()]
    assert given == [(7.0, export(1)), (5.0, run(1)), (8.0, run(2))]
