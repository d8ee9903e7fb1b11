"""Tiny checkpoints whose weights are quantized, and the same ones with plain numbers.

The codes are made as simply as can be: what counts is that both hold the same numbers.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import make_checkpoint
from tests.model.quantized_samples import packed

GROUP = 32
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = tuple(math.erf(step / 8) for step in range(-8, 8))  # as good a table as theirs
_FP8_MAX = 448.0

Quantized = tuple[dict[str, Tensor], Tensor]
"""The parts of a weight by the endings of their names, and its numbers."""


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is quantized.

    Attributes:
        settings: of config.json.
        quantize: makes the parts of a weight.
        family: of the model.
        everywhere: the embedding and the head are quantized, too.
        stacked: the experts of a layer are in one tensor, as MLX keeps them.
    """

    settings: Mapping[str, Any]
    quantize: Callable[[Tensor], Quantized]
    family: str = "llama"
    everywhere: bool = False
    stacked: bool = False

    def picks(self, name: str, weight: Tensor) -> bool:
        """Return whether this weight is quantized."""
        if self.family == "gpt_oss":
            return weight.dim() == 3
        in_layers = ".layers." in name and ".gate." not in name
        return weight.dim() == 2 and (in_layers or self.everywhere)

    def name(self, name: str) -> str:
        """Return the name of the tensor that holds a weight of the plain checkpoint."""
        return re.sub(r"\.experts\.\d+\.", ".switch_mlp.", name) if self.stacked else name


def make_quantized(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write a checkpoint quantized as `kind`, and one with the same numbers in float32."""
    how = KINDS[kind]
    plain = make_checkpoint(folder / "plain", how.family, num_layers=2, **SIZES)
    held = load_file(plain / "model.safetensors")
    made: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name in sorted(held):
        names.setdefault(how.name(name), []).append(name)
    for name, sources in names.items():
        weight = held[sources[0]]
        if not how.picks(sources[0], weight):
            made[name] = weight
            continue
        if name not in held:
            weight = torch.stack([held[source] for source in sources])
        parts, values = how.quantize(weight)
        if name in held:
            held[name] = values
        else:
            held |= dict(zip(sources, values, strict=True))
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        made |= {stem + ending: tensor for ending, tensor in parts.items()}
    quantized = folder / "quantized"
    quantized.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | how.settings))
    for path, tensors in ((plain, held), (quantized, made)):
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path / "model.safetensors",
            {"format": "pt"},
        )
    return quantized, plain


def _in_groups(matrix: Tensor, size: int) -> Tensor:
    """Return numbers [.., width] as [.., groups, size]."""
    return matrix.reshape(*matrix.shape[:-1], -1, size)


def _affine(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and zero points, int64, and scales, float16, in groups of inputs."""
    grouped = _in_groups(weight, GROUP)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / ((1 << bits) - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, (1 << bits) - 1)
    codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, (1 << bits) - 1).flatten(-2).long(), zeros.long(), scales


def _numbers(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    steps = _in_groups(codes, GROUP) - zeros[..., None]
    return (steps * scales.float()[..., None]).flatten(-2)


def _gptq(weight: Tensor) -> Quantized:
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    codes, zeros, scales = _affine(weight[:, order], 4)
    back = order.argsort()
    parts = {
        "qweight": packed(codes[:, back], 4).t(),
        "qzeros": packed(zeros.t() - 1, 4),
        "scales": scales.t(),
        "g_idx": (back // GROUP).int(),
    }
    return parts, _numbers(codes, zeros, scales)[:, back]


def _awq(weight: Tensor) -> Quantized:
    codes, zeros, scales = _affine(weight, 4)

    def words(matrix: Tensor) -> Tensor:
        ordered = _in_groups(matrix.t(), 8)[..., torch.tensor(_AWQ_ORDER)].flatten(1)
        return packed(ordered, 4)

    parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.t()}
    return parts, _numbers(codes, zeros, scales)


def _mlx(weight: Tensor) -> Quantized:
    codes, zeros, scales = _affine(weight, 4)
    biases = (-zeros * scales.float()).half()
    numbers = _in_groups(codes, GROUP) * scales.float()[..., None] + biases.float()[..., None]
    parts = {"weight": packed(codes, 4).view(torch.uint32), "scales": scales, "biases": biases}
    return parts, numbers.flatten(-2)


def _w8a8(weight: Tensor) -> Quantized:
    scales = weight.abs().amax(-1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes * scales


def _fp8(weight: Tensor) -> Quantized:
    blocks = weight.reshape(-1, GROUP, weight.shape[1] // GROUP, GROUP)
    scales = blocks.abs().amax((1, 3)) / _FP8_MAX
    narrow = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = narrow.float() * scales[:, None, :, None]
    parts = {"weight": narrow.reshape(weight.shape), "weight_scale_inv": scales}
    return parts, numbers.reshape(weight.shape)


def _nf4(weight: Tensor) -> Quantized:
    table = torch.tensor(_NF4, dtype=torch.float32)
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = ((blocks / largest)[..., None] - table).abs().argmin(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    pairs = codes.reshape(-1, 2)
    parts = {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8),
        "weight.absmax": largest.flatten(),
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return parts, (table[codes] * largest).reshape(weight.shape)


def _mxfp4(weight: Tensor) -> Quantized:
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    blocks = _in_groups(weight.transpose(1, 2), 32)  # stored as [.., inputs, outputs]
    exponents = blocks.abs().amax(-1).log2().floor().int() - 2
    scales = torch.exp2(exponents.float())[..., None]
    codes = ((blocks / scales)[..., None] - table).abs().argmin(-1)
    pairs = _in_groups(codes, 2)
    numbers = (table[codes] * scales).flatten(-2).transpose(1, 2)
    parts = {
        "blocks": (pairs[..., 1] << 4 | pairs[..., 0]).to(torch.uint8),
        "scales": (exponents + 127).to(torch.uint8),
    }
    return parts, numbers


def _method(name: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **more}}


KINDS: Mapping[str, Kind] = {
    "gptq": Kind(_method("gptq", bits=4, group_size=GROUP, desc_act=True), _gptq, "qwen3_moe"),
    "awq": Kind(_method("awq", bits=4, group_size=GROUP, version="gemm"), _awq),
    "mlx": Kind(
        {"quantization": {"group_size": GROUP, "bits": 4}},
        *(_mlx, "qwen3_moe"),
        everywhere=True,
        stacked=True,
    ),
    "w8a8": Kind(
        _method(
            "compressed-tensors",
            format="int-quantized",
            config_groups={"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
        ),
        _w8a8,
    ),
    "fp8": Kind(_method("fp8", weight_block_size=[GROUP, GROUP]), _fp8, "qwen3_moe"),
    "nf4": Kind(_method("bitsandbytes", load_in_4bit=True), _nf4),
    "mxfp4": Kind(_method("mxfp4"), _mxfp4, "gpt_oss"),
}
