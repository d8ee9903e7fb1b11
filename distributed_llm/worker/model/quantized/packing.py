"""Takes codes of few bits out of the words that they are packed in."""

import torch
from torch import Tensor

from distributed_llm.common.weight_forms import WeightForm
from distributed_llm.worker.model.quantized.affine import AffineWeight

_BYTE_BITS = 8


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the codes in words of any type, uint8, one after the other from the lowest bit.

    Args:
        words: integers [..., count].
        bits: of a code, 1 to 8; 32 words end where a code ends.
    """
    packed = words.contiguous().view(torch.uint8)
    if bits == _BYTE_BITS:
        return packed
    if _BYTE_BITS % bits == 0:
        fields = [packed >> shift & (1 << bits) - 1 for shift in range(0, _BYTE_BITS, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)
    eight = packed.view(*packed.shape[:-1], -1, bits)  # codes, in as many bytes as a code has bits
    joined = torch.zeros(eight.shape[:-1], dtype=torch.int64)
    for place, byte in enumerate(eight.unbind(-1)):
        joined |= byte.long() << place * _BYTE_BITS
    codes = [joined >> place * bits & (1 << bits) - 1 for place in range(_BYTE_BITS)]
    return torch.stack(codes, dim=-1).flatten(-2).to(torch.uint8)


def affine(
    codes: Tensor, scales: Tensor, offsets: Tensor, bits: int, form: WeightForm | None
) -> AffineWeight:
    """Return a weight with scales for groups as `form` has them, if that has smaller ones.

    Args:
        codes: as in `AffineWeight`, like `scales` and `offsets`, but of any floating-point type.
        scales: see there.
        offsets: see there.
        bits: of a code.
        form: that the weight will have in memory.
    """
    if form and form.group:
        times = codes.shape[-1] // scales.shape[-1] // form.group
        scales, offsets = (part.repeat_interleave(times, -1) for part in (scales, offsets))
    return AffineWeight(codes, scales.float().contiguous(), offsets.float().contiguous(), bits)


def sorted_by_group(weight: AffineWeight, group_of: Tensor, groups: int) -> AffineWeight | Tensor:
    """Return a weight of which input i is in group `group_of[i]`, with its columns in groups.

    If groups differ in size it is returned as its values.

    Args:
        weight: with its columns as the input is ordered.
        group_of: integers [in_features], from 0 to `groups` - 1.
        groups: number of groups, as the files have them.
    """
    inputs = weight.codes.shape[-1]
    size, group_of = inputs // groups, group_of.long()
    if torch.equal(group_of, torch.arange(inputs) // size):
        return weight
    times = weight.scales.shape[-1] // groups
    if bool((torch.bincount(group_of, minlength=groups) != size).any()):
        of_groups = (part[..., ::times] for part in (weight.scales, weight.offsets))
        scales, offsets = (part[..., group_of] for part in of_groups)
        return weight.codes * scales + offsets
    order = group_of.argsort(stable=True)
    return AffineWeight(weight.codes[..., order], weight.scales, weight.offsets, weight.bits, order)
