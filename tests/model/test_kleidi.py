"""Weights of 4 bits in the order of Arm's KleidiAI, with operations of torch that are made up."""

import pytest
import torch
from torch import Tensor

from distributed_llm.worker.model.kernels import measuring
from distributed_llm.worker.model.kernels.choice import Kind
from distributed_llm.worker.model.kernels.kleidi import Int4Kleidi
from tests.made_up_kleidi import Operations, offer

SMALL = Kind("int4", "", "small")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weight_of(channels: int, inputs: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and offsets; middle codes stand for other numbers than zero."""
    scales = (torch.rand(channels, inputs // group) + 0.5).bfloat16().float()
    offsets = (torch.rand(scales.shape) - 9) * scales
    return torch.randint(16, (channels, inputs), dtype=torch.uint8), scales, offsets


@pytest.mark.parametrize(
    ("channels", "inputs", "group"), [(300, 256, 64), (7, 96, 32), (64, 128, 128), (1, 64, 32)]
)
def test_products(channels: int, inputs: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, Operations())
    codes, scales, offsets = weight_of(channels, inputs, group)
    weight = codes.view(channels, -1, group) * scales[..., None] + offsets[..., None]
    layout = Int4Kleidi(codes, scales, offsets)
    assert layout.nbytes < weight.nbytes / 4
    (product,) = layout.kernels().values()
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 3, 50):
            states = torch.randn(rows, inputs).to(dtype)
            expected = states.float() @ weight.flatten(1).T
            most = states.float().norm(dim=1)[:, None] * weight.flatten(1).norm(dim=1)
            assert ((product(states) - expected).abs() / most).max() < 0.01


def test_it_is_measured_where_torch_has_it_and_it_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tried() -> set[tuple[str, str]]:
        return set(measuring.seconds_of(SMALL, (64, 128), patience=1e9))

    class Wrong(Operations):
        def product(self, *arguments: object) -> Tensor:
            return super().product(*arguments) * 1.05  # type: ignore[arg-type]

    ours = ("kleidi", "kleidi")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.kleidiai, "is_available", lambda: False)
        assert ours not in tried()
    with monkeypatch.context() as patch:
        offer(patch, Operations())
        assert ours in tried()
    with monkeypatch.context() as patch:
        offer(patch, Wrong())
        assert ours not in tried()


def test_what_torch_does_without_a_kernel_for_the_processor_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes 32 bits for each code."""

    class Reference(Operations):
        def pack(self, *arguments: object) -> Tensor:
            return super().pack(*arguments).float()  # type: ignore[arg-type]

    offer(monkeypatch, Reference())
    with pytest.raises(NotImplementedError, match="this processor"):
        Int4Kleidi(*weight_of(16, 64, 32))


@pytest.mark.parametrize("group", [32, 64])
def test_the_operations_made_up_compute_what_torchs_do(group: int) -> None:
    codes, scales, _ = weight_of(24, 64, group)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    scales = scales if group == 64 else scales.bfloat16()
    states = torch.randn(5, 64)
    sizes = group, 64, 24
    real = torch.ops.aten
    theirs = real._dyn_quant_matmul_4bit(
        states, real._dyn_quant_pack_4bit_weight(packed, scales, None, *sizes), *sizes
    )
    made_up = Operations()
    ours = made_up.product(states, made_up.pack(packed, scales, None, *sizes), *sizes)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
