"""Integers with scales arrive in a model as they are in the files, whatever becomes of their rows.

The reference is the same model from a checkpoint of floating-point numbers, with the same values.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import INT8, Quantize, WeightForm
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model import experts, layer_loading
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.linear import QuantLinear
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.model.quantized.rows import from_rows, row_bytes, to_rows
from distributed_llm.worker.model.weights import load_stage_model
from tests.checkpoints import make_checkpoint
from tests.model.driver import CPU

GROUP = 32
INT4 = WeightForm(4, GROUP)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
LARGE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
LAYERS = re.compile(r"\.layers\.\d+\.(?!.*(norm|router|mlp\.gate\.)).*weight$")


class Kept(nn.Module):
    """Stands for `QuantLinear`, and keeps what it is made of."""

    def __init__(self, weight: AffineWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.held = weight
        self.bias = bias

    @classmethod
    def of(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> "Kept":
        QuantLinear.of(weight, bias, dtype)  # refuses what fits no form
        return cls(weight, bias)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_loading, experts):
        monkeypatch.setattr(module, "QuantLinear", Kept)


def loaded(checkpoint: Checkpoint, quantize: Quantize = "none") -> nn.Module:
    layers = LayerRange(0, checkpoint.num_layers)
    return load_stage_model(
        checkpoint, layers, device=CPU, dtype=torch.float32, quantize=quantize
    ).model


def matrices(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.weight
        elif isinstance(module, Kept):
            found[name] = module.held.dequantized()
        elif stacks := experts.expert_stacks(module):
            for part, stack in (("up", stacks.up), ("down", stacks.down)):
                for expert, matrix in enumerate(module.get_parameter(stack)):
                    found[f"{name}.{part}.{expert}"] = matrix.T if stacks.transposed else matrix
    return found


def forms(model: nn.Module) -> set[tuple[int, int]]:
    found = (m.held for m in model.modules() if isinstance(m, Kept))
    return {(held.bits, held.group) for held in found}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def mlx(name: str, weight: AffineWeight) -> dict[str, Tensor]:
    codes = weight.codes.to(torch.int64).view(*weight.scales.shape[:-1], -1, 8)
    words = sum(codes[..., i] << 4 * i for i in range(8))
    return {
        name: torch.as_tensor(words).to(torch.uint32),
        name.replace(".weight", ".scales"): weight.scales,
        name.replace(".weight", ".biases"): weight.offsets,
    }


@given(st.integers(0, 2**32), st.sampled_from([INT8, INT4, WeightForm(4, 64)]), st.booleans())
def test_rows_of_bytes_hold_integers_exactly(seed: int, form: WeightForm, stacked: bool) -> None:
    numbers = torch.Generator().manual_seed(seed)
    weight = quantized(torch.randn(*([2] if stacked else []), 3, 128, generator=numbers), form)
    rows = to_rows(weight, form)
    assert rows.shape == (*weight.codes.shape[:-1], row_bytes(form, 128))
    back = from_rows(rows, form)
    assert back.bits == weight.bits
    for one in ("codes", "scales", "offsets"):
        assert torch.equal(getattr(back, one), getattr(weight, one))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_integers_in_the_files_stay_what_they_are(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, num_layers=2, **SIZES)
    tensors = load_file(folder / "model.safetensors")
    weights = {name: quantized(t, INT4) for name, t in tensors.items() if LAYERS.search(name)}
    assert weights
    plain = {name: weight.dequantized() for name, weight in weights.items()}
    reference = matrices(loaded(write(folder, {**tensors, **plain})))
    files = {name: tensor for name, tensor in tensors.items() if name not in weights}
    for name, weight in weights.items():
        files |= mlx(name, weight)
    settings = {"bits": 4, "group_size": GROUP}
    model = loaded(write(folder, files, quantization=settings))
    found = matrices(model)
    assert forms(model) == {(4, GROUP)}
    assert found.keys() == reference.keys()
    for name, matrix in reference.items():
        assert torch.equal(found[name], matrix), name


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_floating_point_numbers_become_integers_while_they_are_loaded(
    tmp_path: Path, family: str
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=2, **SIZES))
    reference, model = matrices(loaded(checkpoint)), loaded(checkpoint, "int8")
    assert bool(forms(model)) == (family != "gpt2")
    for name, matrix in matrices(model).items():
        is_kept = isinstance(model.get_submodule(name), Kept)
        expected = quantized(reference[name], INT8).dequantized() if is_kept else reference[name]
        assert torch.equal(matrix, expected), name


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_plans_know_what_weights_take(tmp_path: Path, quantize: Quantize) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "llama", num_layers=2, **LARGE))
    layers = LayerRange(0, 2)
    planned = model_cost(checkpoint, "bfloat16", quantize).weight_bytes(layers)
    stage = load_stage_model(
        checkpoint, layers, device=CPU, dtype=torch.bfloat16, quantize=quantize
    )
    assert stage.nbytes == pytest.approx(planned, rel=0.03)
