"""Quantized weights as their formats keep them, against what the formats' libraries compute.

The samples are made by `quantized_samples.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.form_in_memory import form_in_memory
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.schemes.reading import stored_weights
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.decoding import decoded
from tests.model.quantized_samples import GROUP, INPUTS, MODULE, PATH, SAMPLES, VALUES

DTYPES = {
    **{torch.int32: "I32", torch.uint32: "U32", torch.uint8: "U8", torch.int8: "I8"},
    **{torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"},
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"},
}
IN_ORDER = torch.arange(INPUTS, dtype=torch.int32)
INT4 = WeightForm(4, 32)
EXACT = {
    **{"gptq 4": INT4, "gptq 4 ordered": INT4, "gptq 8": INT8, "gptq 2": WeightForm(4, 64)},
    **{"awq": INT4, "ct w4a16": INT4, "ct w4a16 asym": INT4, "ct w4a16 ordered": INT4},
    **{"ct w8a16": INT8, "ct w8a8": INT8, "bnb int8": INT8},
    **{"mlx 2": INT4, "mlx 3": INT4, "mlx 4": WeightForm(4, 64)},
}
"""Samples that a form holds as they are; the others become the nearest, INT8."""

ROUNDED = {"bnb int8"}
"""Samples whose library multiplies in another order, so that the last bit may differ."""


def sample(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Return the settings of a sample, its tensors by their names in files, and its values."""
    with safe_open(PATH, "pt") as file:
        config = {"quantization_config": json.loads(file.metadata()[name]), "hidden_size": INPUTS}
        found = {
            key.removeprefix(f"{name}/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118  # not a mapping
            if key.startswith(f"{name}/")
        }
    values = found.pop(VALUES)
    return config, {named(part): tensor for part, tensor in found.items()}, values


def named(part: str) -> str:
    return MODULE + (part if part.startswith("_") else f".{part}")


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, "", DTYPES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }


def read(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Return the one weight that these tensors make."""
    (weight,) = stored_weights(config, infos(tensors)).values()
    return weight


def decode(weight: StoredWeight, tensors: Mapping[str, Tensor]) -> AffineWeight | Tensor:
    return decoded(weight, {part: tensors[info.name] for part, info in weight.parts.items()})


@pytest.mark.parametrize("name", SAMPLES)
def test_values_are_those_of_the_formats_own_library(name: str) -> None:
    config, tensors, values = sample(name)
    weight = read(config, tensors)
    assert weight.name == (MODULE if name == "mxfp4" else f"{MODULE}.weight")
    assert weight.shape == tuple(values.shape)
    assert weight.scheme is not None
    form = EXACT.get(name, INT8)
    assert weight.scheme.form(weight.shape) == form
    assert form_in_memory(weight, in_layers=True, quantize="none") == form
    assert weight.scheme.is_exact(weight.shape) == (name in EXACT)
    made = decode(weight, tensors)
    if isinstance(made, AffineWeight):
        assert made.fits(form) == (name in EXACT)
        made = made.dequantized()
    assert made.dtype == torch.float32
    if name in ROUNDED:
        assert (made - values.float()).abs().max() < 3e-7
    else:
        assert torch.equal(made.to(values.dtype), values)


LABELS = {
    "gptq 4": "GPTQ, 4 bits, groups of 32",
    "gptq 8": "GPTQ, 8 bits, a scale per channel",
    "awq": "AWQ, 4 bits, groups of 32",
    "ct w8a8": "compressed-tensors, 8 bits, a scale per channel",
    "ct fp8 tensor": "FP8, a scale per matrix",
    "ct fp8": "FP8, a scale per channel",
    "fp8": "FP8, blocks of 8 x 32",
    "mxfp4": "MXFP4, groups of 32",
    "mlx 4": "MLX, 4 bits, groups of 64",
    "bnb nf4": "bitsandbytes NF4",
    "bnb int8": "bitsandbytes, 8 bits",
}


@pytest.mark.parametrize("name", LABELS)
def test_what_people_call_it(name: str) -> None:
    config, tensors, _ = sample(name)
    weight = read(config, tensors)
    assert weight.scheme is not None
    assert weight.scheme.label == LABELS[name]


def test_groups_of_different_sizes_become_values() -> None:
    """Such files are not usual, but no rule of the format forbids them."""
    config, tensors, _ = sample("gptq 4 ordered")
    index = f"{MODULE}.g_idx"
    weight = read(config, tensors)
    whole = decode(weight, tensors | {index: IN_ORDER // GROUP})
    assert isinstance(whole, AffineWeight)
    made = decode(weight, tensors | {index: IN_ORDER // 40})
    assert isinstance(made, Tensor)
    same = (made == whole.dequantized()).all(dim=0)
    assert same[:GROUP].all()
    assert same[40:].all()
    assert not same[GROUP:40].any()


WRONG: dict[str, tuple[str, str, Tensor, str]] = {
    "a group that there is not": (
        *("gptq 4 ordered", "g_idx", torch.full((INPUTS,), 2, dtype=torch.int32)),
        "names groups from 2 to 2, and there are 2",
    ),
    "an order with a group that there is not": (
        *("ct w4a16 ordered", "weight_g_idx", torch.full((INPUTS,), 2, dtype=torch.int32)),
        "there are 2 groups",
    ),
    "another shape": (
        *("ct w4a16", "weight_shape", torch.tensor([16, 63])),
        r"the other tensors say \[16, 64\]",
    ),
    "no JSON": (
        *("bnb nf4", "weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8)),
        "is not JSON",
    ),
    "an order for a GPU": (
        *("bnb int8", "weight_format", torch.tensor(2, dtype=torch.uint8)),
        "weight_format 2",
    ),
    "another block": (
        *("bnb nf4", "weight.absmax", torch.zeros(9, dtype=torch.uint8)),
        "contradict one another",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_numbers_that_contradict_one_another(case: str) -> None:
    name, part, tensor, words = WRONG[case]
    config, tensors, _ = sample(name)
    tensors[f"{MODULE}.{part}"] = tensor
    with pytest.raises(CheckpointError, match=words):
        decode(read(config, tensors), tensors)
