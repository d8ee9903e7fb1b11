"""Makes the samples of quantized weights that `test_quantized_formats.py` reads.

Each is a small matrix, or a stack of them, as a format keeps it, with the values that the format's
own library computes from it. Of GPTQ, and of the order of inputs in compressed-tensors, no library
computes without a GPU: these are packed here, number by number, as their layout is described.

Needs compressed-tensors, bitsandbytes and mlx:

    python -m tests.model.quantized_samples
"""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).parent / "quantized_samples.safetensors"
MODULE = "model.layers.0.mlp.experts.up_proj"
VALUES = "values"
OUTPUTS, INPUTS, GROUP = 16, 64, 32

Sample = tuple[dict[str, Any], dict[str, Tensor], Tensor]
"""What config.json says, tensors by their names after the module's, and the values."""


def _library(name: str) -> Any:
    """Return a module of a library that is needed here alone."""
    return import_module(name)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack the rows of a matrix into words, one code after the other from the lowest bit."""
    rows = []
    for row in codes.flatten(0, -2).tolist():
        number = sum(code << place * bits for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), np.int32))
    return torch.from_numpy(np.stack(rows)).view(*codes.shape[:-1], -1)


def _gptq(bits: int, *, group: int, sym: bool, ordered: bool, version: str) -> Sample:
    per_channel, middle = group < 0, 1 << bits - 1
    groups = 1 if per_channel else INPUTS // group
    codes = torch.randint(1 << bits, (INPUTS, OUTPUTS))
    zeros = torch.full((groups, OUTPUTS), middle)
    if not sym:
        zeros = torch.randint(1, 1 << bits, (groups, OUTPUTS))
    scales = (torch.rand(groups, OUTPUTS) / 9).half()
    order = torch.randperm(INPUTS) if ordered else torch.arange(INPUTS)
    group_of = torch.empty(INPUTS, dtype=torch.int32)
    group_of[order] = torch.arange(INPUTS, dtype=torch.int32) // (INPUTS // groups)
    values = scales.float()[group_of.long()] * (codes - zeros[group_of.long()])
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
    settings |= {"desc_act": ordered, "checkpoint_format": version}
    tensors = {
        "qweight": packed(codes.t(), bits).t().contiguous(),
        "qzeros": packed(zeros - int(version == "gptq"), bits),
        "scales": scales,
        "g_idx": group_of,
    }
    return settings, tensors, values.t().contiguous()


def _awq() -> Sample:
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (INPUTS, OUTPUTS // 8), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (2, OUTPUTS // 8), dtype=torch.int32),
        "scales": (torch.rand(2, OUTPUTS) / 9).half(),
    }
    converters = _library("compressed_tensors.entrypoints.convert.converters.autoawq")
    converter = converters.AutoAWQConverter(group_size=GROUP)
    made = converter.process({f"{MODULE}.{name}": t for name, t in tensors.items()})
    made = {name.removeprefix(f"{MODULE}."): t for name, t in made.items()}
    args = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return settings, tensors, _decompressed("pack-quantized", args, made)


def _scheme(args: dict[str, Any]) -> Any:
    kinds = _library("compressed_tensors.quantization")
    return kinds.QuantizationScheme(targets=["Linear"], weights=kinds.QuantizationArgs(**args))


def _decompressed(form: str, args: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    values: Tensor = _compressor(form).decompress(tensors, _scheme(args))["weight"]
    return values


def _compressor(form: str) -> Any:
    return _library("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(form)


def _compressed(form: str, dtype: torch.dtype, **args: Any) -> Sample:
    """Quantize with scales that are as good as any: what counts is what is read."""
    strategy = args["strategy"]
    inputs = {"group": INPUTS // GROUP, "block": INPUTS // 32}.get(strategy, 1)
    outputs = {"tensor": 1, "block": OUTPUTS // 8}.get(strategy, OUTPUTS)
    shape = (1,) if strategy == "tensor" else (outputs, inputs)
    weight = _random(OUTPUTS, INPUTS).to(dtype)
    top = 448 if args.get("type") == "float" else 1 << args["num_bits"] - 1
    tensors = {"weight": weight, "weight_scale": ((1 + torch.rand(shape)) * 3 / top).to(dtype)}
    if not args.get("symmetric", True):
        tensors["weight_zero_point"] = torch.randint(-3, 4, shape, dtype=torch.int8)
    made = _compressor(form).compress(tensors, _scheme(args))
    group = {"weights": args, "targets": ["Linear"], "format": form}
    settings: dict[str, Any] = {"quant_method": "compressed-tensors", "format": form}
    settings |= {"config_groups": {"group_0": group}}
    return settings, made, _decompressed(form, args, dict(made))


def _compressed_order() -> Sample:
    settings, tensors, _ = _compressed(_PACK, torch.bfloat16, **_GROUPS)
    group_of = (torch.randperm(INPUTS) // GROUP).to(torch.int32)
    codes = torch.randint(16, (OUTPUTS, INPUTS))
    tensors |= {"weight_packed": packed(codes, 4), "weight_g_idx": group_of}
    values = (codes - 8) * tensors["weight_scale"].float()[:, group_of.long()]
    return settings, tensors, values


def _fp8_blocks() -> Sample:
    weight = _random(OUTPUTS, INPUTS).to(torch.float8_e4m3fn)
    scale = torch.rand(OUTPUTS // 8, INPUTS // 32) / 9
    settings = {"quant_method": "fp8", "weight_block_size": [8, 32]}
    fp8 = _library("transformers.integrations.finegrained_fp8")
    values = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale)
    return settings, {"weight": weight, "weight_scale_inv": scale}, values


def _mxfp4() -> Sample:
    blocks = torch.randint(256, (2, OUTPUTS, INPUTS // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 130, (2, OUTPUTS, INPUTS // 32), dtype=torch.uint8)
    mxfp4 = _library("transformers.integrations.mxfp4")
    values = mxfp4.convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    return {"quant_method": "mxfp4"}, {"_blocks": blocks, "_scales": scales}, values


def _mlx(bits: int, group: int, stack: tuple[int, ...] = ()) -> Sample:
    mx = _library("mlx.core")
    weight = mx.array(_random(*stack, OUTPUTS, INPUTS).numpy())
    parts = mx.quantize(weight, group_size=group, bits=bits)
    packed, scales, biases = (torch.from_numpy(np.array(part)) for part in parts)
    values = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=group, bits=bits)))
    settings = {"group_size": group, "bits": bits}
    return settings, {"weight": packed, "scales": scales, "biases": biases}, values


def _bnb_table(table: str, *, nested: bool) -> Sample:
    functional = _library("bitsandbytes.functional")
    weight, state = functional.quantize_4bit(
        _random(OUTPUTS, INPUTS), blocksize=64, quant_type=table, compress_statistics=nested
    )
    tensors = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    values = functional.dequantize_4bit(weight, state)
    return {"quant_method": "bitsandbytes"}, {"weight": weight, **tensors}, values


def _bnb_int8() -> Sample:
    functional = _library("bitsandbytes.functional")
    weight, scales, _ = functional.int8_vectorwise_quant(_random(OUTPUTS, INPUTS).half())
    tensors = {"weight": weight, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    values = functional.int8_vectorwise_dequant(weight, scales)
    return {"quant_method": "bitsandbytes"}, tensors, values


_PACK, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_GROUPS: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_CHANNELS: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
_TENSOR: dict[str, Any] = {"num_bits": 8, "strategy": "tensor"}
_BLOCKS: dict[str, Any] = {"num_bits": 8, "strategy": "block", "block_structure": [8, 32]}

SAMPLES: dict[str, Callable[[], Sample]] = {
    "gptq 4": partial(_gptq, 4, group=32, sym=True, ordered=False, version="gptq"),
    "gptq 4 ordered": partial(_gptq, 4, group=32, sym=False, ordered=True, version="gptq"),
    "gptq 8": partial(_gptq, 8, group=-1, sym=True, ordered=False, version="gptq"),
    "gptq 2": partial(_gptq, 2, group=64, sym=False, ordered=True, version="gptq_v2"),
    "awq": _awq,
    "ct w4a16": partial(_compressed, _PACK, torch.bfloat16, **_GROUPS),
    "ct w4a16 asym": partial(_compressed, _PACK, torch.float16, symmetric=False, **_GROUPS),
    "ct w4a16 ordered": _compressed_order,
    "ct w8a16": partial(_compressed, _PACK, torch.bfloat16, **_CHANNELS),
    "ct w8a8": partial(_compressed, _INT, torch.bfloat16, **_CHANNELS),
    "ct w8a8 asym": partial(_compressed, _INT, torch.bfloat16, symmetric=False, **_TENSOR),
    "ct fp8": partial(_compressed, _FLOAT, torch.bfloat16, type="float", **_CHANNELS),
    "ct fp8 tensor": partial(
        _compressed, "naive-quantized", torch.bfloat16, type="float", **_TENSOR
    ),
    "ct fp8 block": partial(_compressed, _FLOAT, torch.bfloat16, type="float", **_BLOCKS),
    "fp8": _fp8_blocks,
    "mxfp4": _mxfp4,
    **{f"mlx {bits}": partial(_mlx, bits, 32) for bits in (2, 3, 5, 6, 8)},
    "mlx 4": partial(_mlx, 4, 64, (2,)),
    "bnb nf4": partial(_bnb_table, "nf4", nested=True),
    "bnb fp4": partial(_bnb_table, "fp4", nested=False),
    "bnb int8": _bnb_int8,
}


def main() -> None:
    """Write the samples."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, str] = {}
    for name, make in SAMPLES.items():
        settings, parts, values = make()
        configs[name] = json.dumps(settings)
        parts = {**parts, VALUES: values}
        tensors |= {f"{name}/{part}": t.contiguous().clone() for part, t in parts.items()}
    save_file(tensors, PATH, configs)


if __name__ == "__main__":
    main()
