"""Decode steps that are graphs compute what they do without, or are none."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_llm.worker import devices
from distributed_llm.worker.kv.page_tables import HostTables, Piece, TableKey, TokenTables
from distributed_llm.worker.model.decode_graphs import static_inputs
from distributed_llm.worker.model.decode_graphs.capture import CudaCapture, capture_of
from distributed_llm.worker.model.decode_graphs.steps import DecodeGraphs, DecodeStep
from distributed_llm.worker.model.decode_graphs.watch import NotAGraph, Watch
from tests.made_up_graphs import MadeUpCapture

CPU, META = torch.device("cpu"), torch.device("meta")
KEY = TableKey(windowed=False, window=0, section=0, group=2)
WIDTH = 4
POSITIONS = 64


@dataclass
class Model:
    """Writes a row for each token, and gives the sums of the rows that it attends to.

    Attributes:
        rows: the KV cache, [positions, width].
        changes: what is done to the sums, in `compute`; by which a test breaks it.
        plain: how many steps were computed without a graph.
    """

    rows: Tensor = field(default_factory=lambda: torch.randn(POSITIONS, WIDTH, generator=seed()))
    changes: Callable[[Tensor], Tensor] = lambda sums: sums
    plain: int = 0

    def compute(
        self, given: Mapping[str, Tensor], tables: Mapping[TableKey, TokenTables]
    ) -> Tensor:
        own = tables[KEY]
        numbers = given["token_ids"][:, None] + torch.arange(WIDTH, device=CPU)
        self.rows.index_copy_(0, own.slots, numbers.sin())
        places = torch.arange(POSITIONS, device=CPU)
        starts = own.starts[:-1, None]
        inside = (places >= starts) & (places < starts + own.lengths[:, None])
        of_pieces = inside.float() @ self.rows
        ends = own.query_ends[1:] // KEY.group
        numbered = torch.arange(own.shape.rows, device=CPU)
        piece = torch.searchsorted(ends, numbered, right=True).clamp(max=own.shape.pieces - 1)
        parts = of_pieces[piece][own.places] * own.counts[..., None]
        return self.changes(parts.sum(dim=0))


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step_of(model: Model, texts: Sequence[tuple[int, ...]], memory: object = 0) -> DecodeStep:
    """Return a step of the last tokens of texts, each with the slots of its positions."""
    pieces = []
    for number, slots in enumerate(texts):
        starts = [at for at, slot in enumerate(slots) if not at or slot != slots[at - 1] + 1]
        stops = [*starts[1:], len(slots)]
        pieces += [
            Piece(slots[at], stop - at, (number,)) for at, stop in zip(starts, stops, strict=True)
        ]
    tables = {KEY: HostTables([slots[-1] for slots in texts], pieces, KEY.group)}
    given = {"token_ids": torch.tensor([sum(slots) for slots in texts])}

    def plainly() -> Tensor:
        model.plain += 1
        (own,) = tables.values()
        sizes = own.shape, own.most_queries, own.most_positions
        return model.compute(given, {KEY: TokenTables.of(own.packed(own.shape), *sizes)})

    return DecodeStep(
        given=given,
        tables=tables,
        memory=memory,
        compute=model.compute,
        plainly=plainly,
        launch=lambda graph: graph(),
    )


def expected(model: Model, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the sums; what a text sees of its own last token is that token."""
    rows = model.rows.clone()
    for slots in texts:
        rows[slots[-1]] = (sum(slots) + torch.arange(WIDTH)).sin()
    return torch.stack([rows[list(slots)].sum(dim=0) for slots in texts])


STEPS: list[list[tuple[int, ...]]] = [
    [(1, 2, 3)],
    [(1, 2, 3, 4)],
    [(1, 2, 3, 4, 5)],
    [(1, 2, 3, 4, 5, 6)],
    [(1, 2, 3, 4, 5, 6, 7), (16, 17), (20,)],
    [(1, 2, 3, 4, 5, 6, 7, 8), (16, 17, 18), (20, 21)],
    [(1, 2, 3, 4, 5, 6, 7, 8, 30), (16, 17, 18, 19)],
    [(16, 17, 18, 19, 40), (20, 21, 22), (50,), (52, 53)],
    [(16, 17, 18, 19, 40, 41), (20, 21, 22, 23), (50, 51), (52, 53, 54)],
    [(16, 17, 18, 19, 40, 41, 42), (20, 21, 22, 23, 24), (50, 51, 60), (52, 53, 54, 55)],
]


def run(graphs: DecodeGraphs, model: Model, texts: Sequence[tuple[int, ...]]) -> None:
    right = expected(model, texts)
    torch.testing.assert_close(graphs.run(step_of(model, texts)), right)


@pytest.fixture
def capture() -> MadeUpCapture:
    return MadeUpCapture()


def graphs_of(capture: MadeUpCapture, room_bytes: int = 1 << 30) -> DecodeGraphs:
    return DecodeGraphs(capture, CPU, room_bytes)


def test_steps_that_come_and_go_compute_the_same(capture: MadeUpCapture) -> None:
    graphs, model = graphs_of(capture), Model()
    for texts in (*STEPS, *reversed(STEPS)):
        run(graphs, model, texts)
    assert capture.recorded == 4, "of one token, of two, and of four with one part or two"
    assert capture.replayed - capture.recorded == 2 * len(STEPS) - model.plain == 12


def test_what_differs_from_step_to_step_is_sent_once(
    capture: MadeUpCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, model = graphs_of(capture), Model()
    for _ in range(2):
        run(graphs, model, STEPS[4])
    sent: list[int] = []

    def overwritten(target: Tensor, tensor: Tensor) -> None:
        sent.append(tensor.nbytes)
        devices.overwritten(target, tensor)

    monkeypatch.setattr(static_inputs, "overwritten", overwritten)
    run(graphs, model, STEPS[5])
    assert len(sent) == 1


# ------------------------------------------------------------------ what cannot be a graph


def looks(sums: Tensor) -> Tensor:
    return sums + 1 if float(sums.sum()) > 1e9 else sums


def counts(sums: Tensor) -> Tensor:
    sums[sums > 1e9] += 1
    return sums


def passes_by(sums: Tensor) -> Tensor:
    """Look at numbers in a way that torch does not see on a CPU."""
    return sums + 0 * torch.tensor(sums.tolist(), device=CPU)


def sends(sums: Tensor) -> Tensor:
    """Send what the CPU makes: a graph reads it where it lay."""
    return sums + torch.tensor([1.0] * WIDTH) - torch.ones(WIDTH, device=CPU)


def mixes(sums: Tensor) -> Tensor:
    """Let tokens see one another, those that make up a number as well."""
    return sums + len(sums) - 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (looks, "aten._local_scalar_dense.default has the CPU wait for numbers"),
        (counts, "aten.index.Tensor has the CPU wait for numbers"),
        (passes_by, "operation not permitted when stream is capturing"),
        (sends, "a graph gave something else than what it was made of"),
        (mixes, "rows that make up a number change what others give"),
    ],
)
def test_a_step_that_is_no_graph_is_computed_as_ever(
    change: Callable[[Tensor], Tensor],
    why: str,
    capture: MadeUpCapture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And one line of the log says why."""
    graphs, model = graphs_of(capture), Model(changes=change)
    for texts in (*STEPS[4:6], *STEPS[4:]):
        step = step_of(model, texts)
        torch.testing.assert_close(graphs.run(step), change(expected(model, texts)))
    assert model.plain == 8
    (line,) = caplog.messages
    assert why in line


def test_numbers_of_a_step_that_are_in_no_tensor_show(
    capture: MadeUpCapture, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, model = graphs_of(capture), Model()
    for texts in STEPS[:4]:
        step, right = step_of(model, texts), expected(model, texts) + len(texts[0])
        torch.testing.assert_close(graphs.run(replace(step, plainly=right.clone)), right)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("dtype", "factor", "kept"),
    [
        (torch.float32, 1.0001, True),
        (torch.float32, 1.01, False),
        (torch.bfloat16, 1.05, True),
        (torch.bfloat16, 1.5, False),
        (torch.float32, float("nan"), False),
    ],
)
def test_products_of_other_sizes_may_round_otherwise(
    dtype: torch.dtype, factor: float, kept: bool, capture: MadeUpCapture
) -> None:
    graphs, model = graphs_of(capture), Model(changes=lambda sums: sums.to(dtype))
    for texts in STEPS[4:6]:
        step = step_of(model, texts)
        right = (expected(model, texts) * factor).to(dtype)
        assert graphs.run(replace(step, plainly=right.clone)).dtype == dtype
    assert len(graphs._book) == kept


def test_memory_of_one_step_must_not_be_another_ones(capture: MadeUpCapture) -> None:
    """A GPU would read what lies there by then; the one of these tests says so."""
    graphs, model = graphs_of(capture), Model()
    kept = [torch.ones(WIDTH)]
    model.changes = lambda sums: sums * kept[0]
    for texts in STEPS[:2]:
        run(graphs, model, texts)
    kept[0] = torch.ones(WIDTH)
    with pytest.raises(AssertionError, match="freed"):
        run(graphs, model, STEPS[2])


def test_memory_that_moved_needs_other_graphs(capture: MadeUpCapture) -> None:
    graphs, model = graphs_of(capture), Model()
    for texts in STEPS[:3]:
        run(graphs, model, texts)
    assert capture.replayed == 2
    model.rows = model.rows.clone()
    for texts in STEPS[:4]:
        right = expected(model, texts)
        torch.testing.assert_close(graphs.run(step_of(model, texts, memory=1)), right)
    assert (capture.recorded, capture.replayed) == (2, 5)


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such kernel")]
)
def test_what_fails_while_it_is_recorded_costs_speed(
    failure: Exception, capture: MadeUpCapture, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that was there before goes on."""
    graphs, model = graphs_of(capture), Model()
    for texts in STEPS[:2]:
        run(graphs, model, texts)
    capture.failure = failure
    for texts in (*STEPS[4:6], *STEPS[4:6], STEPS[2]):
        run(graphs, model, texts)
    assert (capture.recorded, capture.replayed) == (1, 2)
    (line,) = caplog.messages
    assert "1 are" in line
    assert str(failure) in line


def test_a_device_that_failed_ends_its_worker(capture: MadeUpCapture) -> None:
    graphs, model = graphs_of(capture), Model()
    run(graphs, model, STEPS[0])
    capture.failure = torch.AcceleratorError("unspecified launch failure")
    with pytest.raises(torch.AcceleratorError):
        run(graphs, model, STEPS[1])


def test_graphs_take_no_more_memory_than_there_is_for_them(
    capture: MadeUpCapture, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, model = graphs_of(capture, room_bytes=5 * capture.graph_bytes // 2), Model()
    for texts in (*STEPS, *reversed(STEPS)):
        run(graphs, model, texts)
    assert capture.recorded == 2
    (line,) = caplog.messages
    assert "2 are: they take 2 MiB of 2 MiB" in line


def test_graphs_that_took_too_much_memory_give_it_back(
    capture: MadeUpCapture, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, model = graphs_of(capture, room_bytes=capture.graph_bytes // 2), Model()
    for texts in STEPS[:4]:
        run(graphs, model, texts)
    assert (capture.recorded, capture.replayed) == (1, 1)
    (line,) = caplog.messages
    assert "0 are: they take 1 MiB of 0 MiB" in line
    assert graphs._outputs is None


# ------------------------------------------------------------------ what a GPU would not say


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (lambda here: here + torch.ones(2).to(META), "aten._to_copy.default copies"),
        (lambda here: here.copy_(torch.ones(2)), "aten.copy_.default copies"),
        (lambda here: here.cpu(), "aten._to_copy.default copies"),
        (lambda here: here.sum().item(), "aten._local_scalar_dense.default has the CPU wait"),
        (lambda here: here.nonzero(), "aten.nonzero.default has the CPU wait"),
        (lambda here: here[here > 0], "aten.index.Tensor has the CPU wait"),
    ],
)
def test_what_no_graph_can_have_is_named(compute: Callable[[Tensor], Tensor], why: str) -> None:
    here = torch.ones(2, device=META)
    with pytest.raises(NotAGraph, match=re.escape(why)), Watch(META):
        compute(here)


def test_what_a_graph_can_have_passes() -> None:
    here = torch.ones(2, device=META)
    with Watch(META):
        others = torch.arange(2, device=META) + 1, torch.tensor(2.0), torch.ones(2) + 1
        assert (here * others[1])[others[0] - 1].device == META


# ------------------------------------------------------------------ graphs of CUDA


class FakeCuda:
    """What `CudaCapture` calls of torch, as lines of a log.

    Attributes:
        log: of the calls.
        failures: by line, what a call raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.failures: dict[str, Exception] = {}
        current = SimpleNamespace(wait_stream=lambda other: self.say("main waits"))
        side = SimpleNamespace(wait_stream=lambda other: self.say("side waits"))
        graph = SimpleNamespace(
            capture_begin=lambda pool, capture_error_mode: self.say(f"begin {capture_error_mode}"),
            capture_end=lambda: self.say("end"),
            replay=lambda: self.say("replay"),
        )
        fakes: dict[str, Any] = {
            "Stream": lambda device: side,
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device: current,
            "device": lambda device: self.within("device"),
            "stream": lambda stream: self.within("side"),
            "synchronize": lambda device: self.say("synchronize"),
            "empty_cache": lambda: self.say("empty cache"),
            "CUDAGraph": lambda: graph,
            "mem_get_info": lambda device: (7, 9),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def say(self, line: str) -> None:
        self.log.append(line)
        if line in self.failures:
            raise self.failures[line]

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.log.append(f"into {name}")
        try:
            yield
        finally:
            self.log.append(f"out of {name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


INSIDE = ["into device", "into side", "begin thread_local", "compute", "end"]
BEFORE, OUT = ["synchronize", "empty cache"], ["out of side", "out of device"]


def test_a_graph_of_cuda_is_recorded_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    capture = CudaCapture(torch.device("cuda:1"))
    launch = capture.record(lambda: cuda.say("compute"))
    assert cuda.log == [*BEFORE, *INSIDE, *OUT]
    cuda.log.clear()
    launch()
    capture.rehearse(lambda: cuda.say("compute"))
    assert cuda.log == ["replay", "side waits", *INSIDE[:2], "compute", *OUT, "main waits"]
    assert capture.free_bytes() == 7
    assert cuda.log[-2:] == BEFORE


def test_what_follows_a_rehearsal_that_failed_waits_for_it(cuda: FakeCuda) -> None:
    cuda.failures["compute"] = NotAGraph("it looks at numbers")
    with pytest.raises(NotAGraph):
        CudaCapture(torch.device("cuda:1")).rehearse(lambda: cuda.say("compute"))
    assert cuda.log == ["side waits", *INSIDE[:2], "compute", *OUT, "main waits"]


def test_a_recording_that_fails_ends_and_names_its_first_cause(cuda: FakeCuda) -> None:
    cuda.failures = {
        "compute": RuntimeError("operation not permitted\nCompile with"),
        "end": torch.AcceleratorError("capture was invalidated"),
    }
    with pytest.raises(RuntimeError, match=r"^operation not permitted$") as raised:
        CudaCapture(torch.device("cuda:1")).record(lambda: cuda.say("compute"))
    assert not isinstance(raised.value, torch.AcceleratorError), "the device goes on"
    assert cuda.log == [*BEFORE, *INSIDE, *OUT, "synchronize"]


def test_a_device_that_failed_meanwhile_is_told_from_that(cuda: FakeCuda) -> None:
    def compute() -> None:
        cuda.failures["synchronize"] = torch.AcceleratorError("unspecified launch failure")
        raise cuda.failures["synchronize"]

    with pytest.raises(torch.AcceleratorError, match="unspecified"):
        CudaCapture(torch.device("cuda:1")).record(compute)


def test_other_devices_have_no_graphs(cuda: FakeCuda) -> None:
    found = {kind: capture_of(torch.device(kind)) for kind in ("cuda", "cpu", "mps", "xpu", "meta")}
    assert [kind for kind, capture in found.items() if capture is not None] == ["cuda"]
