"""Weights of integers on GPUs: all but torch's own kernels, which are made up on the CPU.

Whether the real ones do what is made up here is tried on each GPU before they are used.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker import devices
from distributed_llm.worker.model.kernels import gpu_orders
from distributed_llm.worker.model.kernels.choice import Choice
from distributed_llm.worker.model.kernels.gpu_check import facts_of, right_choice, used_text
from distributed_llm.worker.model.kernels.gpu_choice import (
    BLOCKS,
    Gpu,
    Integers,
    channel_multiple,
    inner_tiles,
    offers,
)
from distributed_llm.worker.model.kernels.gpu_orders import Int4GpuRows
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.linear import QuantLinear
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.session.events import Load, Loaded
from tests.made_up_gpus import GPUS, forget, gpu
from tests.model.driver import CPU, Pipeline, load_stages
from tests.model.workers import Cluster, workers
from tests.quantized_checkpoints import make_quantized
from tests.reference import generated

AMPERE, TURING = GPUS["cuda"], Gpu("cuda", capability=(7, 5))
TILES = Choice("tiles", ("int4pack",) * 4)
METAL = Choice("rows", ("int4pack", "int4pack", "blocks", "blocks"))
FEW = Choice("rows", ("int8pack", "int8pack", "blocks", "blocks"))
ALL = Choice("rows", ("int8pack",) * 4)


def int4(group: int = 64, dtype: str = "bfloat16") -> Integers:
    return Integers("int4", 96, 256, group, dtype)


def int8(channels: int = 96, inputs: int = 256, dtype: str = "bfloat16") -> Integers:
    return Integers("int8", channels, inputs, 0, dtype)


@pytest.mark.parametrize(
    ("device", "weight", "best"),
    [
        (AMPERE, int4(32), TILES),
        (AMPERE, int4(128, "float16"), TILES),
        (Gpu("cuda", capability=(12, 0)), int4(), TILES),
        (AMPERE, int4(dtype="float32"), None),
        (AMPERE, int4(16), None),
        (TURING, int4(dtype="float16"), None),
        (GPUS["rocm"], int4(), TILES),
        (GPUS["rocm"], int4(dtype="float32"), None),
        (Gpu("rocm", architecture="gfx1100"), int4(), None),
        (GPUS["xpu"], int4(dtype="float32"), TILES),
        (GPUS["mps"], int4(dtype="float16"), METAL),
        (GPUS["mps"], int4(16), None),
        (Gpu("meta"), int4(), None),
        (AMPERE, int8(), FEW),
        (TURING, int8(dtype="float16"), FEW),
        (Gpu("rocm", architecture="gfx1100"), int8(), FEW),
        (GPUS["xpu"], int8(), ALL),
        (GPUS["mps"], int8(), ALL),
        (GPUS["mps"], int8(channels=100), None),
        (GPUS["mps"], int8(inputs=100), None),
        (AMPERE, int8(dtype="float64"), None),
        (Gpu("meta"), int8(), None),
    ],
)
def test_what_a_gpu_is_offered(device: Gpu, weight: Integers, best: Choice | None) -> None:
    assert offers(device, weight) == (BLOCKS,) if best is None else (best, BLOCKS)


def test_tiles_fit_the_weight() -> None:
    sides = {32: 2, 64: 4, 96: 2, 128: 8, 192: 4, 4096: 8, 11008: 8}
    assert {inputs: inner_tiles(inputs) for inputs in sides} == sides
    assert {kind: channel_multiple(one) for kind, one in GPUS.items()} == {
        **{"cuda": 8, "mps": 8},
        **{"rocm": 16, "xpu": 16},
    }


def weight_of(form: WeightForm, shape: tuple[int, int]) -> AffineWeight:
    torch.manual_seed(2)
    return quantized(torch.randn(shape), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", GPUS)
def test_products_are_right_on_every_kind(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides that have to be padded or laid in other tiles, a bias, an order of the inputs."""
    monkeypatch.setattr(gpu_orders, "BLOCK_ELEMENTS", 2000)
    forms = [(INT8, (37, 96)), (INT8, (64, 64)), (WeightForm(4, 32), (37, 96))]
    with gpu(kind, monkeypatch):
        for form, shape in (*forms, (WeightForm(4, 64), (3, 320)), (WeightForm(4, 128), (40, 256))):
            plain = weight_of(form, shape)
            order = torch.randperm(shape[1]) if form.bits == 4 else None
            weight = AffineWeight(plain.codes, plain.scales, plain.offsets, plain.bits, order)
            bias = torch.randn(shape[0])
            layer = QuantLinear.of(weight, bias, dtype)
            for rows in (1, 6, 20, 60):
                states = torch.randn(1, rows, shape[1]).to(dtype)
                output = layer(states)
                expected = states.float() @ weight.dequantized().T + bias
                assert output.dtype == dtype
                assert output.shape == expected.shape
                apart = (output.float() - expected).norm() / expected.norm()
                assert apart < (0.01 if dtype == torch.bfloat16 else 1e-5)
            held = [part.nbytes for part in layer.tensors() if isinstance(part, Tensor)]
            assert layer.weight_bytes == sum(held) > 0
        assert "wrong" not in used_text()
        assert "fails" not in used_text()


def test_blocks_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_orders, "BLOCK_ELEMENTS", 640)
    taken: list[tuple[int, int]] = []
    fill = Int4GpuRows._fill

    def filling(weight: Int4GpuRows, start: int, stop: int, block: Tensor) -> None:
        taken.append((start, stop))
        fill(weight, start, stop, block)

    monkeypatch.setattr(Int4GpuRows, "_fill", filling)
    monkeypatch.setattr("distributed_llm.worker.model.quantized.linear.facts_of", Gpu)
    weight = weight_of(WeightForm(4, 32), (23, 64))
    layer = QuantLinear.of(weight, None, torch.float32)
    states = torch.randn(5, 64)
    torch.testing.assert_close(layer(states), states @ weight.dequantized().T)
    assert taken == [(0, 10), (10, 20), (20, 23)]


def test_an_order_of_inputs_goes_to_the_device() -> None:
    """Files are read on the CPU, and so is their order."""
    there = torch.device("meta")
    plain = weight_of(WeightForm(4, 32), (8, 64))
    codes, scales, offsets = (p.to(there) for p in (plain.codes, plain.scales, plain.offsets))
    weight = AffineWeight(codes, scales, offsets, 4, torch.randperm(64))
    layer = QuantLinear.of(weight, None, torch.bfloat16)
    assert {part.device for part in layer.tensors() if isinstance(part, Tensor)} == {there}
    assert layer(torch.empty(3, 64, device=there, dtype=torch.bfloat16)).shape == (3, 8)


# ------------------------------------------------------------------ tried before it is used


def test_a_kernel_that_is_right_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with gpu("cuda", monkeypatch) as device:
        for _ in range(3):
            assert right_choice(device, int4(), CPU) == TILES
        assert right_choice(device, int8(), CPU) == FEW
        assert used_text() == "int4 in groups of 64 by int4pack, int8 by int8pack and blocks"
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "on cpu weights of int4 in groups of 64 are multiplied by int4pack" in caplog.text


def test_a_kernel_that_is_wrong_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another GPU's operations stand for those of a torch that packs otherwise."""
    with gpu("cuda", monkeypatch):
        for _ in range(2):
            assert right_choice(GPUS["xpu"], int4(), CPU) == BLOCKS
        assert "int4 in groups of 64 by blocks; int4pack is wrong here by " in used_text()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "are multiplied by blocks; int4pack is wrong here" in caplog.text


def test_a_kernel_that_torch_lacks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    assert right_choice(AMPERE, int4(), CPU) == BLOCKS
    assert "by blocks; int4pack fails here: " in used_text()


def test_numbers_that_are_none_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu("mps", monkeypatch) as device:
        nothing = lambda states, *_: states.new_full((len(states), 96), torch.nan)  # noqa: E731
        monkeypatch.setattr(gpu_orders, "_int4_product", nothing)
        assert right_choice(device, int4(), CPU) == BLOCKS


@pytest.mark.parametrize("error", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_device_that_fails_is_not_passed_over(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> Tensor:
        raise error("gone")

    with gpu("cuda", monkeypatch) as device:
        monkeypatch.setattr(gpu_orders, "_int4_product", failing)
        with pytest.raises(error, match="gone"):
            right_choice(device, int4(), CPU)


def test_facts_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
    monkeypatch.setattr(devices, "architecture", lambda device: "gfx942")
    assert facts_of(CPU) is None
    assert facts_of(torch.device("cuda:1")) == Gpu("cuda", capability=(9, 0))
    assert facts_of(torch.device("xpu:0")) == Gpu("xpu")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert facts_of(torch.device("cuda:0")) == Gpu("rocm", architecture="gfx942")


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize(("files", "kind"), [("gptq", "mps"), ("w8a8", "cuda"), ("mlx", "xpu")])
def test_tokens_are_those_of_transformers(
    files: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which those kernels take; experts one by one, and inputs in another order."""
    packed, plain = make_quantized(tmp_path, files)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38]
    with gpu(kind, monkeypatch):
        pipeline = Pipeline(load_stages(open_checkpoint(packed), [1, 1]))
        assert used_text().count("pack") == 1
        pipeline.prefill([prompt], [len(prompt) - 1])
        for _ in range(8):
            pipeline.decode()
    expected = generated(AutoModelForCausalLM.from_pretrained(plain), prompt, 8)
    assert pipeline.texts[0][len(prompt) :] == expected


def test_a_worker_tells_by_what_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = make_quantized(tmp_path, "awq")
    with gpu("mps", monkeypatch), workers("a") as held:
        cluster = Cluster(packed, [("a", (0, 2))], held)
        loaded = held["a"].ask(Load(0, cluster.order(2, (0, 2))), Loaded)
    assert loaded.kernels == "int4 in groups of 32 by int4pack and blocks"
