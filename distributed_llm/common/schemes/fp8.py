"""FP8: floating-point numbers of 8 bits with scales per tensor, per channel or per block."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distributed_llm.common.ngrams import table_part
from distributed_llm.common.schemes.affine import FLOATS
from distributed_llm.common.schemes.parts import Module, NotRead, Tensors
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, WeightForm

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = FLOATS | {"F8_E8M0"}
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Scheme:
    """Parts "weight" [.., outputs, inputs] and "scale", by which numbers are multiplied.

    Attributes:
        block: outputs and inputs that share a scale; 0: all of them.
    """

    block: tuple[int, int]

    @property
    def label(self) -> str:
        """What people call it."""
        match self.block:
            case (0, 0):
                return "FP8, a scale per matrix"
            case (1, 0):
                return "FP8, a scale per channel"
            case (outputs, inputs):
                return f"FP8, blocks of {outputs} x {inputs}"

    def form(self, shape: tuple[int, ...]) -> WeightForm | None:
        """Return the form in memory that holds such a weight best."""
        return INT8

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        """Return whether that form holds the same numbers."""
        return False


def fp8_weights(settings: Mapping[str, Any], tensors: Tensors) -> list[StoredWeight]:
    """Return the weights of 8 bits with scales among these tensors.

    Raises:
        NotRead: they are packed to less than 8 bits.
        CheckpointError: tensors are missing or do not fit each other.
    """
    return list(_weights(settings, tensors))


def _weights(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[StoredWeight]:
    block = block_of(settings.get("weight_block_size"))
    for name, tensor in tensors.items():
        if tensor.dtype not in FP8_DTYPES or len(tensor.shape) < 2:
            continue
        parts, table = {"weight": tensor}, table_part(name)
        whole = name if table is None else table[0]  # parts of a table have a scale in common
        named = (known + ending for known in (name, whole) for ending in _SCALES)
        if scale := next((one for one in named if one in tensors), None):
            parts["scale"] = tensors[scale]
        yield fp8_weight(Module(name.removesuffix(".weight"), "FP8", parts), name, block)


def fp8_weight(module: Module, name: str, block: tuple[int, int]) -> StoredWeight:
    """Return the weight `name` of the parts "weight" and "scale" of a layer.

    Raises:
        CheckpointError: they are missing or do not fit each other.
    """
    *stack, outputs, inputs = module.part("weight", FP8_DTYPES).shape
    scale = module.part("scale", _SCALE_DTYPES).shape
    matrix = scale if len(scale) < 2 else scale[-2:]
    if len(scale) > len(stack) + 2 or (
        scale[:-2] not in ((), tuple(stack)) and any(size != 1 for size in scale[:-2])
    ):
        raise module.unfit("scale", f"a scale for each of {stack} matrices is expected")
    blocks = (-(-outputs // block[0]), -(-inputs // block[1]))
    if matrix in ((), (1,), (1, 1)):
        found = (0, 0)
    elif matrix in ((outputs, 1), (outputs,)):
        found = (1, 0)
    elif matrix == blocks:
        found = block
    else:
        raise module.unfit(
            "scale", f"[1], [{outputs}, 1] or {list(blocks)} (blocks of {block}) is expected"
        )
    return StoredWeight(name, (*stack, outputs, inputs), module.parts, Fp8Scheme(found))


def block_of(sizes: object) -> tuple[int, int]:
    """Return the size of blocks that a config.json names; 128 x 128 if it names none.

    Raises:
        NotRead: it names something else.
    """
    if sizes is None:
        return _DEFAULT_BLOCK
    match sizes:
        case [int(outputs), int(inputs)] if outputs > 0 and inputs > 0:
            return outputs, inputs
    raise NotRead(f"FP8, scales for blocks of {sizes!r}")
