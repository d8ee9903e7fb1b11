"""Makes the weights of a model out of the tensors of its files, whatever format they are in."""

from collections.abc import Mapping

from torch import Tensor

from distributed_llm.common.gguf_types import GgufScheme
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
from distributed_llm.worker.model.quantized.bnb import decode_bnb_int8, decode_bnb_table
from distributed_llm.worker.model.quantized.compressed import decode_compressed
from distributed_llm.worker.model.quantized.gptq import decode_awq, decode_gptq
from distributed_llm.worker.model.quantized.mlx import decode_mlx
from distributed_llm.worker.model.quantized.narrow_floats import decode_fp8, decode_mxfp4


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
