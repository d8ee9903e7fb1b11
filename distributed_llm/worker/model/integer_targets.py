"""Decides which parameters of a layer become integers with scales, and how they get there.

A parameter can be integers if it is the matrix of a linear layer, or a stack of such matrices, one
per expert. It comes as rows of bytes if all that it is made of is quantized in the files, and if
transformers does nothing to it but with whole rows. Otherwise it comes as floating-point numbers,
and becomes integers once it is there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PermuteForRope,
    Split,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from distributed_llm.common.form_in_memory import int4_form
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model.experts import expert_stacks
from distributed_llm.worker.model.incoming import Entry
from distributed_llm.worker.model.quantized.rows import row_bytes


@dataclass(frozen=True)
class Slot:
    """A parameter that integers can take the place of.

    Attributes:
        module: path of the module that has it.
        name: of the parameter in the module.
        shape: [.., out_features, in_features].
        transposed: as floating-point numbers, it is [.., in_features, out_features].
    """

    module: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def slot_of(model: nn.Module, parameter: str) -> Slot | None:
    """Return the slot of a parameter, or None if it has to be floating-point numbers."""
    path, _, name = parameter.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if type(module) is nn.Linear and name == "weight":
        return Slot(path, name, (module.out_features, module.in_features))
    stacks = expert_stacks(module)
    if stacks is None or name not in (stacks.up, stacks.down):
        return None
    experts, first, second = module.get_parameter(name).shape
    sides = (second, first) if stacks.transposed else (first, second)
    return Slot(path, name, (experts, *sides), stacks.transposed)


@dataclass
class Group:
    """Entries of which transformers makes parameters together.

    Attributes:
        entries: by the pattern of the converter that collects them; by their own names without one.
        targets: names of the parameters.
        by_rows: only whole rows are stacked, joined, split or reordered.
    """

    entries: dict[str, list[Entry]]
    targets: tuple[str, ...]
    by_rows: bool

    def weights(self) -> Iterator[StoredWeight]:
        """Yield all weights of the files that belong to it."""
        for entry in self.all_entries():
            yield from (piece.weight for piece in entry.pieces)

    def all_entries(self) -> Iterator[Entry]:
        """Yield all entries."""
        for entries in self.entries.values():
            yield from entries

    def can_carry_rows(self) -> bool:
        """Return whether it can come as rows of bytes."""
        pieces = [piece for entry in self.all_entries() for piece in entry.pieces]
        return self.by_rows and all(p.weight.scheme is not None and p.keeps_rows for p in pieces)

    def input_order(self, orders: Mapping[str, Tensor]) -> Tensor | None:
        """Return the order of the inputs that its matrices have in common.

        Args:
            orders: of the entries that have one, by their names.

        Returns:
            [in_features], or [matrices, in_features] if it is a stack; None if there is none.

        Raises:
            MixedOrders: matrices that are joined have different ones.
        """
        if not any(entry.name in orders for entry in self.all_entries()):
            return None
        if not all(entry.name in orders for entry in self.all_entries()):
            raise MixedOrders
        found = [
            torch.stack([orders[entry.name] for entry in _sorted(entries)])
            for entries in self.entries.values()
        ]
        if any(not torch.equal(one, found[0]) for one in found):
            raise MixedOrders
        return found[0] if len(found[0]) > 1 else found[0][0]


class MixedOrders(Exception):
    """Matrices that are rows of the same parameter take their inputs in different orders."""


def groups_of(
    entries: Iterable[Entry], model: PreTrainedModel, mapping: Sequence[Any]
) -> list[Group]:
    """Return the entries by the parameters that transformers makes of them.

    Args:
        entries: for `model`.
        model: whose parameters they become.
        mapping: transformers' conversions for it.
    """
    names = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for entry in entries:
        renamed, pattern = rename_source_key(entry.name, renamings, converters, prefix, names)
        if renamed not in names and entry.name in names:
            renamed, pattern = rename_source_key(entry.name, [], [], prefix, names)
        converter = by_pattern.get(pattern) if pattern is not None else None
        targets = (renamed,) if converter is None else _targets(renamed, converter)
        rank = len(entry.pieces[0].weight.shape)
        by_rows = converter is None or _acts_on_rows(converter.operations, rank)
        group = groups.setdefault(renamed, Group({}, targets, by_rows))
        group.entries.setdefault(pattern or entry.name, []).append(entry)
    return list(groups.values())


def form_of_group(
    group: Group,
    slots: Sequence[Slot],
    wanted: Callable[[StoredWeight], WeightForm | None],
) -> WeightForm | None:
    """Return the form that the parameters of a group get; None: floating-point numbers.

    If what belongs together would have different forms, it gets the widest.

    Args:
        slots: of the group's parameters.
        wanted: returns the form of a weight by itself.
    """
    forms = {wanted(weight) for weight in group.weights()}
    if None in forms or not forms:
        return None
    form = forms.pop() if len(forms) == 1 else INT8
    assert form is not None
    if form.group and any(slot.shape[-1] % form.group for slot in slots):
        narrower = {int4_form(slot.shape) for slot in slots}
        return narrower.pop() if len(narrower) == 1 else INT8
    return form


def make_room_for_rows(model: nn.Module, slot: Slot, form: WeightForm) -> None:
    """Give a parameter the shape of its rows of bytes in `form`."""
    shape = (*slot.shape[:-1], row_bytes(form, slot.shape[-1]))
    rows = torch.empty(shape, dtype=torch.uint8, device="meta")
    parameter = nn.Parameter(rows, requires_grad=False)
    setattr(model.get_submodule(slot.module), slot.name, parameter)


def _sorted(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: dot_natural_key(entry.name))


def _targets(renamed: str, converter: WeightConverter) -> tuple[str, ...]:
    first, *_ = patterns = converter.target_patterns
    return tuple(renamed.replace(first, pattern) for pattern in patterns)


def _acts_on_rows(operations: Sequence[Any], rank: int) -> bool:
    """Return whether operations on tensors of `rank` dimensions leave rows whole."""
    for operation in operations:
        match operation:
            case MergeModulelist(dim=0):
                rank += 1
            case Chunk(dim=dim) | Concatenate(dim=dim) | Split(dim=dim):
                if dim not in (rank - 2, -2):
                    return False
            case PermuteForRope():
                pass
            case _:
                return False
    return True
