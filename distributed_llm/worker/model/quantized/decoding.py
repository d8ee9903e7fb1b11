"""Makes the weights of a model out of the tensors of its files, whatever format they are in."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from distributed_llm.common.gguf_types import GgufScheme
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.schemes.awq import AwqScheme
from distributed_llm.common.schemes.bnb import BnbInt8Scheme, BnbTableScheme
from distributed_llm.common.schemes.compressed import CompressedScheme
from distributed_llm.common.schemes.fp8 import Fp8Scheme
from distributed_llm.common.schemes.gptq import GptqScheme
from distributed_llm.common.schemes.mlx import MlxScheme
from distributed_llm.common.schemes.mxfp4 import Mxfp4Scheme
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.worker.model.quantized import gguf
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.bnb import (
    bnb_table_shape,
    check_bnb_order,
    decode_bnb_int8,
    decode_bnb_table,
)
from distributed_llm.worker.model.quantized.compressed import check_compressed, decode_compressed
from distributed_llm.worker.model.quantized.gptq import check_gptq, decode_awq, decode_gptq
from distributed_llm.worker.model.quantized.mlx import decode_mlx
from distributed_llm.worker.model.quantized.narrow_floats import decode_fp8, decode_mxfp4

_CODE_BITS = 8
_SAMPLE_BYTES = 1 << 16


def shape_of(weight: StoredWeight, read: Callable[[TensorInfo], Tensor] | None) -> tuple[int, ...]:
    """Return the shape of a weight, once the small parts are checked that say how it is meant.

    Args:
        weight: what the files hold.
        read: returns a tensor of the files; None: they are not here, and nothing is checked.

    Raises:
        CheckpointError: the tensors contradict one another.
    """
    if read is None:
        return weight.shape
    match weight.scheme:
        case GptqScheme() if "g_idx" in weight.parts:
            check_gptq(weight, read(weight.parts["g_idx"]))
        case CompressedScheme() as scheme:
            small = ("weight_g_idx", "weight_shape")
            held = {name: read(weight.parts[name]) for name in small if name in weight.parts}
            if "weight" in weight.parts and scheme.bits < _CODE_BITS:
                held["weight"] = read(_beginning(weight.parts["weight"]))
            check_compressed(weight, scheme, held)
        case BnbInt8Scheme() if "weight_format" in weight.parts:
            check_bnb_order(weight, read(weight.parts["weight_format"]))
        case BnbTableScheme() as scheme:
            return bnb_table_shape(weight, scheme, read(weight.parts[scheme.state]))
    return weight.shape


def _beginning(tensor: TensorInfo) -> TensorInfo:
    """Return the first of the bytes that a tensor consists of, as a tensor."""
    nbytes = min(tensor.nbytes, _SAMPLE_BYTES)
    return replace(tensor, shape=(nbytes,), nbytes=nbytes)


def decoded(weight: StoredWeight, parts: Mapping[str, Tensor]) -> AffineWeight | Tensor:
    """Return a weight: as integers with scales if it is that, else as floating-point numbers.

    Args:
        weight: what the files hold.
        parts: its tensors, by the names that `weight.parts` has.

    Returns:
        Integers with the groups that the scheme's form has, or float32 [.., outputs, inputs];
        a plain tensor as it is.

    Raises:
        CheckpointError: the tensors contradict one another.
    """
    match weight.scheme:
        case None:
            return parts[""]
        case GgufScheme(kind=kind):
            return gguf.decode(parts[""], kind)
        case GptqScheme() as scheme:
            return decode_gptq(weight, scheme, parts)
        case AwqScheme() as scheme:
            return decode_awq(weight, scheme, parts)
        case CompressedScheme() as scheme:
            return decode_compressed(weight, scheme, parts)
        case Fp8Scheme() as scheme:
            return decode_fp8(scheme, parts)
        case Mxfp4Scheme():
            return decode_mxfp4(parts)
        case MlxScheme() as scheme:
            return decode_mlx(weight, scheme, parts)
        case BnbInt8Scheme():
            return decode_bnb_int8(weight, parts)
        case BnbTableScheme() as scheme:
            return decode_bnb_table(weight, scheme, parts)
    raise NotImplementedError(f"no decoder for {weight.scheme}")
