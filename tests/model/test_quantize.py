"""Integers that are made of floating-point weights."""

import pytest
import torch
from torch import Tensor

from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.model.kernels.native import library, quantizing
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.quantize import quantized

needs_library = pytest.mark.skipif(
    not library.supported()[1:], reason="the C library was not built here"
)
FORMS = [INT8, *(WeightForm(4, group) for group in INT4_GROUPS)]


def _weights(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def _error(weight: AffineWeight, values: Tensor) -> float:
    """Return the error as a share of the values, both as root mean squares."""
    return float((weight.dequantized() - values.float()).norm() / values.float().norm())


def _rounded_to_ends(values: Tensor, group: int) -> AffineWeight:
    """Return codes of 4 bits, of which 0 is a group's least weight and 15 its largest."""
    grouped = values.float().view(*values.shape[:-1], -1, group)
    lowest, highest = grouped.aminmax(dim=-1)
    scales = (highest - lowest) / 15
    codes = ((grouped - lowest[..., None]) / scales[..., None]).round().byte()
    return AffineWeight(codes.flatten(-2), scales, lowest, 4)


def _by_torch(monkeypatch: pytest.MonkeyPatch, values: Tensor, form: WeightForm) -> AffineWeight:
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "can_quantize", lambda values, group: False)
        return quantized(values, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_are_of_the_form_and_close(form: WeightForm) -> None:
    values = _weights(3, 40, 256)
    weight = quantized(values, form)
    assert weight.fits(form)
    assert weight.codes.shape == values.shape
    assert _error(weight, values) < {8: 0.01, 4: 0.1}[form.bits]


def test_no_code_of_8_bits_is_off_by_more_than_half_a_step() -> None:
    values = _weights(16, 256)
    weight = quantized(values, INT8)
    assert ((weight.dequantized() - values.float()).abs() <= weight.scales * 0.5001).all()


@pytest.mark.parametrize("group", INT4_GROUPS)
def test_the_search_beats_scales_that_reach_both_ends(group: int) -> None:
    values = _weights(64, 512) ** 3  # with tails longer than a normal distribution's
    searched, plain = quantized(values, WeightForm(4, group)), _rounded_to_ends(values, group)
    assert _error(searched, values) < 0.96 * _error(plain, values)


def test_numbers_that_are_on_a_grid_stay_the_same() -> None:
    scales = torch.tensor([[0.5, 0.0078125]])
    offsets = torch.tensor([[-4.0, -0.03125]])
    codes = torch.arange(64).remainder(16).byte().view(1, 64)
    grid = AffineWeight(codes, scales, offsets, 4)
    again = quantized(grid.dequantized(), WeightForm(4, 32))
    assert again.codes.equal(codes)
    assert again.dequantized().equal(grid.dequantized())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_that_are_all_the_same_are_kept(form: WeightForm) -> None:
    values = torch.tensor([[0.0], [0.75], [-3.0]]).expand(3, 128).bfloat16()
    torch.testing.assert_close(quantized(values, form).dequantized(), values.float())


def test_rows_do_not_depend_on_those_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values, form = _weights(10, 128), WeightForm(4, 32)
    whole = _by_torch(monkeypatch, values, form)
    monkeypatch.setattr(f"{quantized.__module__}._BLOCK", 3 * 128)
    in_blocks = _by_torch(monkeypatch, values, form)
    assert whole.codes.equal(in_blocks.codes)
    assert whole.scales.equal(in_blocks.scales)


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="96 inputs do not fall into groups of 64"):
        quantized(_weights(4, 96), WeightForm(4, 64))


@needs_library
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.02, 50.0, 1e-6, 1e-36, 0.0])
def test_the_c_library_makes_the_integers_that_torch_makes(
    monkeypatch: pytest.MonkeyPatch, form: WeightForm, dtype: torch.dtype, size: float
) -> None:
    values = torch.randn(2, 37, 384, generator=torch.Generator().manual_seed(0))
    values = (values**3 * size).to(dtype)
    values[0, 0, :128] = 0.75
    assert quantizing.can_quantize(values, form.group)
    made, expected = quantized(values, form), _by_torch(monkeypatch, values, form)
    for name in ("codes", "scales", "offsets"):
        assert getattr(made, name).equal(getattr(expected, name)), name


@needs_library
@pytest.mark.parametrize("inputs", [1, 7, 8, 101])
def test_the_c_library_takes_channels_of_any_size(
    monkeypatch: pytest.MonkeyPatch, inputs: int
) -> None:
    values = _weights(200, inputs)[::2].t().contiguous().t()  # not row by row
    made, expected = quantized(values, INT8), _by_torch(monkeypatch, values, INT8)
    assert made.codes.equal(expected.codes)
    assert made.scales.equal(expected.scales)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_do_not_become_finite(form: WeightForm, wrong: float) -> None:
    values = _weights(3, 128)
    values[1, 5] = wrong
    made = quantized(values, form).dequantized()
    assert not made[1, 5].isfinite()
    assert made[[0, 2]].isfinite().all()
