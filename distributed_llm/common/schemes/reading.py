"""Tells the weights of a model from the tensors of its files, whatever format they are in.

What is quantized is told by the tensors, not by the lists of exceptions that a config.json may
have: a layer that was left alone has a weight of floating-point numbers.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from distributed_llm.common.gguf_types import GGUF_BLOCKS, GGUF_METHOD, GgufScheme
from distributed_llm.common.other_formats import (
    QUANTIZATION_NAMES,
    quantization,
    quantization_of_tensors,
)
from distributed_llm.common.schemes.awq import awq_weights
from distributed_llm.common.schemes.bnb import bnb_weights
from distributed_llm.common.schemes.compressed import compressed_weights
from distributed_llm.common.schemes.fp8 import fp8_weights
from distributed_llm.common.schemes.gptq import gptq_weights
from distributed_llm.common.schemes.mlx import mlx_weights
from distributed_llm.common.schemes.mxfp4 import mxfp4_weights
from distributed_llm.common.schemes.parts import NotRead, Tensors
from distributed_llm.common.stored_weights import StoredWeight

Settings = Mapping[str, Any]
_Reader = Callable[[Settings, Tensors], list[StoredWeight]]

_NOT_NEEDED = re.compile(
    r"(^|[._])(input|output|activation|act|[qkv]|kv|prob)_(global_)?(scale|zero_point)$"
    r"|\.input_scale_ub$"
)
"""Tensors about activations and cached keys and values, which are computed as they are."""


def _gguf_weights(settings: Settings, tensors: Tensors) -> list[StoredWeight]:
    return [
        StoredWeight(name, tensor.shape, {"": tensor}, GgufScheme(tensor.dtype))
        for name, tensor in tensors.items()
        if tensor.dtype in GGUF_BLOCKS
    ]


def _auto_round_weights(settings: Settings, tensors: Tensors) -> list[StoredWeight]:
    packing = str(settings.get("packing_format"))
    if packing == "auto_round:auto_gptq":
        return gptq_weights({**settings, "checkpoint_format": "gptq"}, tensors)
    if packing == "auto_round:auto_awq":
        return awq_weights({**settings, "version": "gemm"}, tensors)
    raise NotRead(f"AutoRound's packing_format {packing!r}")


def _modelopt_weights(settings: Settings, tensors: Tensors) -> list[StoredWeight]:
    algorithm = str(settings.get("quant_algo"))
    if not algorithm.startswith("FP8"):
        raise NotRead(f"ModelOpt's {algorithm}")
    return fp8_weights(settings, tensors)


_READERS: Mapping[str, _Reader] = {
    "auto-round": _auto_round_weights,
    "awq": awq_weights,
    "bitsandbytes": bnb_weights,
    "compressed-tensors": compressed_weights,
    "fbgemm_fp8": fp8_weights,
    "fp8": fp8_weights,
    "gptq": gptq_weights,
    "intel/auto-round": _auto_round_weights,
    GGUF_METHOD: _gguf_weights,
    "mlx": mlx_weights,
    "modelopt": _modelopt_weights,
    "mxfp4": mxfp4_weights,
}
"""Readers of formats, by `quant_method`."""


def stored_weights(config: Settings, tensors: Tensors) -> dict[str, StoredWeight]:
    """Return the weights that these tensors make, by their names.

    Args:
        config: content of config.json, which says how they are quantized.
        tensors: by their names in the files.

    Raises:
        NotRead: they are quantized in a way that is not known.
        CheckpointError: tensors are missing, or do not fit each other.
    """
    method = check_method(config)
    settings = {**_settings(config), "hidden_size": config.get("hidden_size")}
    found = _READERS[method](settings, tensors) if method else []
    used = {part.name for weight in found for part in weight.parts.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    if method != GGUF_METHOD and (how := quantization_of_tensors(rest.values())):
        raise NotRead(how)
    if method:
        rest = {name: t for name, t in rest.items() if not _NOT_NEEDED.search(name)}
    plain = (StoredWeight(name, tensor.shape, {"": tensor}) for name, tensor in rest.items())
    return {weight.name: weight for weight in (*found, *plain)}


def check_method(config: Settings) -> str | None:
    """Return the method by which, as config.json says, weights are quantized; None: they are not.

    Raises:
        NotRead: it is none that is read.
    """
    settings = _settings(config)
    method = settings.get("quant_method")
    if isinstance(method, str) and method in _READERS:
        return method
    if {"group_size", "bits"} <= settings.keys() and method is None:
        return "mlx"
    if (how := quantization(config)) is not None:
        raise NotRead(how)
    return None


def _settings(config: Settings) -> Settings:
    """Return what config.json says about how the weights are quantized; nothing if they are not."""
    for name in QUANTIZATION_NAMES:
        settings = config.get(name)
        if isinstance(settings, Mapping) and settings:
            inner = settings.get("quantization_config")
            return {**settings, **(inner if isinstance(inner, Mapping) else {})}
    return {}
