"""Finds weights that are no finite numbers, once a result shows that there are some."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.worker.model.kernels import OpaqueWeights
from distributed_llm.worker.model.shared_weights import StageModel

_SHOWN_NAMES = 3


def check_finite_weights(stage_model: StageModel, checkpoint: Checkpoint) -> None:
    """Raise if any weights of a stage are not finite; reads all of them.

    Raises:
        CheckpointError: with the layer, the modules and what to do.
    """
    names = list(_not_finite(stage_model))
    if not names:
        return
    dtype = stage_model.model.dtype
    more = "" if len(names) <= _SHOWN_NAMES else f", and {len(names) - _SHOWN_NAMES} more"
    cause, remedy = "The files are damaged", ""
    if dtype == torch.float16:
        cause, remedy = f"{cause}, or {dtype} is too narrow", ", or serve it with --dtype float32"
    raise CheckpointError(
        f"Weights of the model in {checkpoint.place} are not finite numbers: "
        f"{', '.join(names[:_SHOWN_NAMES])}{more}. {cause}: compare them with the original, and "
        f"copy or download them again, on this machine and where the coordinator runs{remedy}."
    )


def _not_finite(stage_model: StageModel) -> Iterator[str]:
    """Yield the modules with such weights: "norm", or "up_proj of layer 3"."""
    inside = {id(module) for module in stage_model.layers.modules()}
    for number, layer in zip(_numbers(stage_model), stage_model.layers, strict=True):
        for name, module in layer.named_modules():
            if not _is_finite(module):
                yield f"{name} of layer {number}"
    for name, module in stage_model.model.named_modules():
        if id(module) not in inside and not _is_finite(module):
            yield name


def _numbers(stage_model: StageModel) -> range:
    """Return the numbers of a stage's layers, for people."""
    return range(stage_model.numbers.start + 1, stage_model.numbers.stop + 1)


def _is_finite(module: nn.Module) -> bool:
    """Return whether the weights of a module itself are finite, as far as they can be looked at."""
    held: list[object] = list(module.parameters(recurse=False))
    if isinstance(module, OpaqueWeights):
        held += module.tensors()
    return all(_is_finite_tensor(one) for one in held if isinstance(one, Tensor))


def _is_finite_tensor(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    plain = tensor.to_dense() if tensor.is_mkldnn else tensor
    if plain.element_size() == 1:  # of 8 bits, for which there are no extremes
        plain = plain.to(torch.float32)
    lowest, highest = torch.aminmax(plain)  # a NaN is either
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
