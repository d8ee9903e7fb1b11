"""Every kernel computes the product that it should; choices are kept for the machine they fit."""

import gc
import itertools
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from distributed_llm.worker.model.kernels import chosen, kept_choices, measuring, orders
from distributed_llm.worker.model.kernels.choice import (
    ROWS,
    Choice,
    Kind,
    class_of,
    fastest,
    size_of,
)
from distributed_llm.worker.model.kernels.int4 import channels_of_block
from distributed_llm.worker.model.kernels.int8 import Int8Rows
from distributed_llm.worker.model.kernels.packed import PackedLinear
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.linear import QuantLinear

SHAPES = [(300, 256), (64, 160), (7, 96), (1, 64)]
MACHINE = {"processor": "one", "torch": "2"}
CHOICES = {Kind("int8", "", "large"): Choice("rows", ("upcast",) * 4)}


def int8(shape: tuple[int, int]) -> AffineWeight:
    scales = torch.rand(shape[0], 1) * 0.1 + 0.01
    return AffineWeight(
        torch.randint(1, 256, shape, dtype=torch.uint8), scales, scales * -128, bits=8
    )


def int4(shape: tuple[int, int], group: int = 32, order: bool = False) -> AffineWeight:
    groups = (shape[0], shape[1] // group)
    scales = (torch.rand(groups) * 0.1 + 0.01).bfloat16().float()
    zeros = (torch.rand(groups) * 0.1).bfloat16().float()
    return AffineWeight(
        torch.randint(16, shape, dtype=torch.uint8),
        scales,
        zeros - 8 * scales,
        bits=4,
        input_order=torch.randperm(shape[1]) if order else None,
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def use(monkeypatch: pytest.MonkeyPatch, form: str, order: str, kernel: str) -> None:
    monkeypatch.setattr(
        chosen, "_measured", {f"{form} small": Choice(order, (kernel,) * len(ROWS))}
    )
    monkeypatch.setattr(chosen, "SMALLEST", 1)


CASES = [
    ("int8", "rows", "upcast"),
    ("int8", "rows", "upcast bfloat16"),
    ("int8", "rows", "weight only"),
    ("int8", "fbgemm 7 bits", "fbgemm"),
    pytest.param(
        "int8",
        "onednn",
        "onednn",
        marks=pytest.mark.skipif(
            orders.usual(Kind("int8", "", "large")).order != "fbgemm",
            reason="8 bits overflow without VNNI",
        ),
    ),
    ("int4", "rows", "upcast"),
    ("int4", "pack", "native"),
    ("int4", "pack", "unpacked"),
    ("int4", "pack", "unpacked bfloat16"),
]


@pytest.mark.parametrize(("form", "order", "kernel"), CASES)
def test_kernels_compute_products_of_any_shape_and_order(
    form: str, order: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    use(monkeypatch, form, order, kernel)
    for shape, bias in itertools.product(SHAPES, (None, torch.ones(1))):
        weight = int8(shape) if form == "int8" else int4(shape, order=bias is not None)
        own = None if bias is None else bias.expand(shape[0])
        layer = QuantLinear.of(weight, own, torch.float32)
        for rows in (1, 3, 50):
            states = torch.randn(rows, shape[1])
            states[-1] *= 1000  # one row's large values do nothing to the others
            expected = states @ weight.dequantized().T
            output = layer(states[None])
            assert output.shape == (1, rows, shape[0])
            actual = output[0] - (0 if own is None else own)
            most = states.norm(dim=1)[:, None] * weight.dequantized().norm(dim=1)
            assert ((actual - expected).abs() / most).max() < 0.01


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_small_weights_are_computed_exactly(form: str) -> None:
    weight = int8((20, 64)) if form == "int8" else int4((20, 64), order=True)
    states = torch.randn(5, 64)
    layer = QuantLinear.of(weight, None, torch.float32)
    assert error(layer(states), states @ weight.dequantized().T) < 1e-6
    assert layer(states[:0]).shape == (0, 20)


def test_a_weight_of_no_form_is_refused() -> None:
    weight = int4((4, 64), group=16)
    with pytest.raises(ValueError, match="4 bits in groups of 16"):
        QuantLinear.of(weight, None, torch.float32)


@pytest.mark.skipif(channels_of_block() is None, reason="another order of 4-bit codes")
def test_memory_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "int4", "pack", "native")
    layer = QuantLinear.of(int4((256, 512), 64), None, torch.bfloat16)
    assert layer.weight_bytes == 256 * 512 // 2 + 256 * 8 * 4


def test_layers_are_freed_without_the_garbage_collector() -> None:
    linear = nn.Linear(64, 64, bias=False)
    gc.disable()
    try:
        layers = [PackedLinear(linear), QuantLinear.of(int8((8, 64)), None, torch.float32)]
        alive = [weakref.ref(layer) for layer in layers]
        layers.clear()
        assert [one() for one in alive] == [None, None]
    finally:
        gc.enable()


# ------------------------------------------------------------------ choices


def test_the_order_that_is_fastest_over_all_rows_is_chosen() -> None:
    times = {
        ("a", "one"): (1.0, 9.0, 9.0, 9.0),
        ("a", "two"): (9.0, 2.0, 2.0, 2.0),
        ("b", "one"): (3.0, 1.5, 1.5, 1.5),
        ("c", "one"): (0.1, 0.1, 0.1, math.inf),
    }
    assert fastest(times) == Choice("a", ("one", "two", "two", "two"))
    close = {("a", "one"): (1.0,) * 4, ("b", "one"): (1.05,) * 4}
    assert fastest(close) == Choice("a", ("one",) * 4)
    assert fastest(close, preferred="b") == Choice("b", ("one",) * 4)
    assert fastest({("c", "one"): times["c", "one"]}) is None
    assert [class_of(rows) for rows in (1, 2, 7, 8, 47, 48, 9999)] == [0, 1, 1, 2, 2, 3, 3]
    assert (size_of(2**21 - 1), size_of(2**21)) == ("small", "large")


def test_what_is_measured_is_right_and_a_wrong_kernel_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(Int8Rows):
        def _upcast(self, states: Tensor, dtype: torch.dtype) -> Tensor:
            return super()._upcast(states, dtype) * 1.1

        def _weight_only(self, states: Tensor) -> Tensor:
            raise RuntimeError("this processor lacks it")

    def absent(codes: Tensor, scales: Tensor) -> Wrong:
        raise RuntimeError("this torch lacks it")

    made = {"rows": Int8Rows, "wrong": Wrong, "absent": absent}
    monkeypatch.setattr(measuring, "INT8", made)
    seconds = measuring.seconds_of(Kind("int8", "", "small"), (32, 64), patience=1e9)
    assert {order for order, _ in seconds} == {"rows"}
    assert all(len(times) == len(ROWS) for times in seconds.values())


def test_choices_are_measured_once_and_kept(tmp_path: Path) -> None:
    calls = []

    def measured() -> dict[Kind, Choice]:
        calls.append(1)
        return CHOICES

    expected = {str(kind): choice for kind, choice in CHOICES.items()}
    for _ in range(2):
        assert kept_choices.choices_of(tmp_path / "new", MACHINE, measured) == expected
    assert len(calls) == 1
    other = {**MACHINE, "torch": "3"}
    kept_choices.choices_of(tmp_path / "new", other, measured)
    assert len(calls) == 2
    first, second = sorted((tmp_path / "new").glob("*.json"))
    for damage in (b"", b"{", second.read_bytes(), first.read_bytes().replace(b"rows", b"none")):
        first.write_bytes(damage)
        second.write_bytes(damage)
        calls.clear()
        kept_choices.choices_of(tmp_path / "new", MACHINE, measured)
        kept_choices.choices_of(tmp_path / "new", other, measured)
        assert calls
        assert {len(path.read_bytes()) > 9 for path in (first, second)} == {True}


def test_a_folder_that_cannot_be_written_to_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = kept_choices.choices_of(tmp_path / "file", MACHINE, lambda: CHOICES)
    assert list(choices) == ["int8 large"]


def test_whoever_waits_too_long_uses_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_choices, "_WAIT_S", 0.0)
    with FileLock(tmp_path / "lock"):
        assert kept_choices.choices_of(tmp_path, MACHINE, dict) == {}


def test_the_first_start_tells_what_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, and how far it has come; later starts have nothing to tell."""

    def measured(on_progress: Callable[[int, int], None]) -> dict[Kind, Choice]:
        for done in range(3):
            on_progress(done, 3)
        return CHOICES

    monkeypatch.setattr(kept_choices, "measure", measured)
    monkeypatch.setattr(kept_choices, "_TOLD_EVERY_S", 0.0)
    monkeypatch.setattr(chosen, "use", lambda choices: None)
    monkeypatch.delenv(kept_choices.KERNELS_VARIABLE, raising=False)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        kept_choices.settle(tmp_path, "a processor")
    first, *more, last = [record.getMessage() for record in caplog.records]
    assert first == "first start here: measuring which kernels are the fastest, once"
    assert more == [f"measured kernels for {done} of 3 kinds of weights" for done in (1, 2)]
    assert last.startswith("measured the kernels of this machine in ")


def test_progress_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    told: list[tuple[int, int]] = []
    clock = itertools.count(0.0, 100.0)
    measuring.measure(clock=lambda: next(clock), on_progress=lambda *one: told.append(one))
    assert told == [(0, len(list(measuring.kinds())))]
    progress = kept_choices._Progress()
    for done in range(8):
        progress(done, 8)
    assert len(caplog.records) == 1


def test_who_waits_for_another_worker_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(kept_choices, "_WAIT_S", 0.0)
    with FileLock(tmp_path / "lock"):
        kept_choices.choices_of(tmp_path, MACHINE, dict)
    waits, gave_up = [record.getMessage() for record in caplog.records]
    assert waits == "another worker measures the kernels of this machine: waiting for that"
    assert "uses the usual ones" in gave_up
    assert kept_choices.choices_of(tmp_path, MACHINE, lambda: CHOICES), "nobody holds it now"


def test_a_busy_machine_is_not_judged(tmp_path: Path) -> None:
    clock = itertools.count(0.0, 100.0)
    assert measuring.measure(clock=lambda: next(clock)) is None
    assert kept_choices.choices_of(tmp_path, MACHINE, lambda: None) == {}
    assert not list(tmp_path.glob("*.json"))
