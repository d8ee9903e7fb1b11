"""Loads a model one layer after the other, so that little more is in memory than what is kept.

Weights are read through transformers' own conversion, which renames, fuses and splits tensors that
checkpoints store differently. It is given a shell: the model with one layer and nothing else. What
is to be integers with scales becomes that, and what kernels read in an order of their own is packed
(`kernels`), before the next layer is read.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from distributed_llm.common.block_indexers import block_sizes
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.key_blocks import key_block_sizes
from distributed_llm.common.latents import keeps_latents
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import WeightForm
from distributed_llm.worker.model.block_indexers import use_packed_block_indexers
from distributed_llm.worker.model.experts import PackedExperts, expert_stacks, pack_experts
from distributed_llm.worker.model.fast_norms import replace_norms
from distributed_llm.worker.model.incoming import Entry, Floats, Rows, WeightReader
from distributed_llm.worker.model.indexers import keep_weights_plain, use_packed_indexers
from distributed_llm.worker.model.integer_targets import (
    Group,
    MixedOrders,
    Slot,
    form_of_group,
    groups_of,
    make_room_for_rows,
    slot_of,
)
from distributed_llm.worker.model.kernels import pack_linear_layers
from distributed_llm.worker.model.key_blocks import use_key_block_indexers
from distributed_llm.worker.model.latents import keep_latents
from distributed_llm.worker.model.layer_cuts import CutFloats, LayerCut
from distributed_llm.worker.model.ngram_layers import wrap_ngram_parts
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.linear import QuantLinear, share_states
from distributed_llm.worker.model.quantized.quantize import quantized
from distributed_llm.worker.model.quantized.rows import from_rows
from distributed_llm.worker.model.recurrent_blocks import replace_recurrent_blocks
from distributed_llm.worker.model.state_layers import keep_plain, wrap_mixers
from distributed_llm.worker.model.text_classes import conversions_of
from distributed_llm.worker.model.zaya_layers import replace_zaya_projections

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 3


class ModelLoader:
    """Loads weights into the modules of a model.

    Args:
        model: on the meta device, without layers.
        path: of its list of layers.
        checkpoint: with the weights, for messages.
        reader: of the weights.
        wanted: returns which integers a weight is to become; None: floating-point numbers.
        device: of the weights.
        dtype: of floating-point numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        checkpoint: Checkpoint,
        reader: WeightReader,
        wanted: Callable[[StoredWeight], WeightForm | None],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._path = path
        self._reader = reader
        self._wanted = wanted
        self._where = f"{checkpoint.place}, {checkpoint.model_type!r} model"
        self._described_by = checkpoint.described_by
        self._keeps_latents = keeps_latents(checkpoint.config)
        self._chooses_blocks = block_sizes(checkpoint.config) is not None
        self._chooses_key_blocks = key_block_sizes(checkpoint.config) is not None
        self._device = device
        self._dtype = dtype
        self._mapping = conversions_of(model)
        self._shell = _shell_of(model, path)
        self._kept_in_float32 = tuple(model._get_dtype_plan(dtype))
        self._unknown: set[str] = set()

    def load_layer(
        self,
        layer: nn.Module,
        number: int,
        entries: Sequence[Entry],
        when_read: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        """Load a layer, and return it with the modules that compute.

        Args:
            layer: of the model.
            number: of the layer in the whole model, for messages.
            entries: for it, by names in which the layer's number is 0.
            when_read: called when nothing is left of them but to make integers, and to pack.

        Raises:
            CheckpointError: weights are missing, of the wrong shape, or unreadable.
        """
        keep_plain(layer)
        if self._keeps_latents:
            keep_weights_plain(layer)
        for module in self._shell.modules():
            if isinstance(module, PreTrainedModel):
                cast(Any, module)._is_hf_initialized = False  # it may make buffers of its layers
        _replace(self._shell, self._path, nn.ModuleList([layer]))
        with without_progress_bars():
            self._load_into_shell(entries, number, when_read)
            if self._keeps_latents:
                keep_latents(layer)
                use_packed_indexers(layer)
            if self._chooses_blocks:
                use_packed_block_indexers(layer)
            if self._chooses_key_blocks:
                use_key_block_indexers(layer)
            wrap_ngram_parts(layer)
            pack_experts(self._shell)
            pack_linear_layers(self._shell)
            replace_norms(self._shell)
            share_states(self._shell)
            replace_recurrent_blocks(layer, number)
            replace_zaya_projections(layer)
            wrap_mixers(self._shell)
        loaded = cast(nn.ModuleList, self._shell.get_submodule(self._path))[0]
        _replace(self._shell, self._path, nn.ModuleList())
        return loaded

    def check_layer(self, layer: nn.Module, number: int, entries: Sequence[Entry]) -> None:
        """Raise what loading a layer would raise about names and shapes; reads nothing.

        Args:
            layer: of the model, on the meta device.
            number: of the layer in the whole model, for messages.
            entries: for it, of a reader of shapes.
        """
        _replace(self._shell, self._path, nn.ModuleList([layer]))
        with without_progress_bars():
            self._check_shapes(entries, number)
        _replace(self._shell, self._path, nn.ModuleList())

    def load_outer(
        self, entries: Sequence[Entry], tensors: Mapping[str, Tensor], cut: LayerCut
    ) -> None:
        """Load what is outside the layers.

        Args:
            entries: to read.
            tensors: that are in memory already, by their names.
            cut: what the stage has of matrices with a part for each layer.

        Raises:
            CheckpointError: as for a layer.
        """
        incoming: dict[str, Any] = dict(tensors)
        for entry in entries:
            floats = Floats(self._reader, entry, self._dtype, transposed=False)
            partial = cut.applies_to(entry.name)
            incoming[entry.name] = CutFloats(floats, entry.name, cut) if partial else floats
        with without_progress_bars():
            self._load(self._model, incoming, None)
        self._warn()

    def _load_into_shell(
        self, entries: Sequence[Entry], number: int, when_read: Callable[[], None]
    ) -> None:
        shell = self._shell
        orders: dict[str, Tensor] = {}
        incoming: dict[str, Any] = {}
        rows: list[tuple[Group, list[Slot], WeightForm]] = []
        later: list[tuple[list[Slot], WeightForm]] = []
        for group in groups_of(entries, shell, self._mapping):
            slots, form = self._decide(group)
            if form is not None and group.can_carry_rows():
                rows.append((group, slots, form))
                for entry in group.all_entries():
                    incoming[entry.name] = Rows(self._reader, entry, form, orders)
                continue
            if form is not None:
                later.append((slots, form))
            incoming |= self._floats(group)
        for _, slots, form in rows:
            for slot in slots:
                make_room_for_rows(shell, slot, form)
        try:
            self._load(shell, incoming, number)
        except CheckpointError:
            for slot in (slot for _, slots, _ in rows for slot in slots):
                self._make_room_for_floats(slot)
            self._check_shapes(entries, number)  # says in numbers what it is about, not in bytes
            raise
        when_read()
        found: dict[Slot, AffineWeight] = {}
        for group, slots, form in rows:
            try:
                order = group.input_order(orders)
            except MixedOrders:
                self._load_again_as_floats(group, slots, number)
                later.append((slots, form))
                continue
            for slot in slots:
                found[slot] = from_rows(_taken(shell, slot), form, order)
                if not isinstance(shell.get_submodule(slot.module), nn.Linear):
                    continue
                self._place(slot.module, {slot: found.pop(slot)})
        for slots, form in later:
            for slot in slots:
                values = _taken(shell, slot)
                matrix = values.transpose(-1, -2) if slot.transposed else values
                found[slot] = quantized(matrix, form)
                del values, matrix
                if isinstance(shell.get_submodule(slot.module), nn.Linear):
                    self._place(slot.module, {slot: found.pop(slot)})
        for module in {slot.module for slot in found}:
            self._place(module, {slot: w for slot, w in found.items() if slot.module == module})

    def _decide(self, group: Group) -> tuple[list[Slot], WeightForm | None]:
        """Return the slots of a group and the integers that it becomes, if it does."""
        found = [slot_of(self._shell, target) for target in group.targets]
        slots = [slot for slot in found if slot is not None]
        if len(slots) < len(found) or any(
            re.search(kept, target) for kept in self._kept_in_float32 for target in group.targets
        ):
            return [], None
        return slots, form_of_group(group, slots, self._wanted)

    def _check_shapes(self, entries: Sequence[Entry], number: int) -> None:
        incoming: dict[str, Any] = {}
        for group in groups_of(entries, self._shell, self._mapping):
            incoming |= self._floats(group, self._reader.of_shapes())
        load_config = self._load_config(torch.device("meta"))
        info, _ = convert_and_load_state_dict_in_model(self._shell, incoming, load_config, None)
        self._refuse_problems(self._shell, self._of_layers(info), number)

    def _of_layers(self, info: Any) -> Any:
        """Return what went wrong, but for the modules around the layers, which are not here."""
        info.missing_keys = {n for n in info.missing_keys if n.startswith(f"{self._path}.")}
        return info

    def _floats(self, group: Group, reader: WeightReader | None = None) -> dict[str, Any]:
        transposed = any(_is_transposed(self._shell, target) for target in group.targets)
        return {
            entry.name: Floats(reader or self._reader, entry, self._dtype, transposed=transposed)
            for entry in group.all_entries()
        }

    def _load_again_as_floats(self, group: Group, slots: Sequence[Slot], number: int) -> None:
        for slot in slots:
            self._make_room_for_floats(slot)
        convert_and_load_state_dict_in_model(
            self._shell, self._floats(group), self._load_config(), None
        )

    def _make_room_for_floats(self, slot: Slot) -> None:
        shape = list(slot.shape)
        if slot.transposed:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        empty = torch.empty(shape, dtype=self._dtype, device="meta")
        parameter = nn.Parameter(empty, requires_grad=False)
        setattr(self._shell.get_submodule(slot.module), slot.name, parameter)

    def _place(self, path: str, weights: Mapping[Slot, AffineWeight]) -> None:
        """Replace a module by one that computes with integers."""
        module: Any = self._shell.get_submodule(path)
        if isinstance(module, nn.Linear):
            (weight,) = weights.values()
            _replace(self._shell, path, QuantLinear.of(weight, module.bias, self._dtype))
            return
        stacks = expert_stacks(module)
        assert stacks is not None
        by_name = {slot.name: weight for slot, weight in weights.items()}
        up, down = by_name.get(stacks.up), by_name.get(stacks.down)
        _replace(self._shell, path, PackedExperts.of(module, self._dtype, up=up, down=down))

    def _load_config(self, device: torch.device | None = None) -> LoadStateDictConfig:
        return LoadStateDictConfig(
            device_map={"": device or self._device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=cast(Any, self._mapping),
        )

    def _load(self, model: PreTrainedModel, tensors: dict[str, Any], number: int | None) -> None:
        """Load tensors into a model; `number` is that of its layer, if it has one."""
        load_config = self._load_config()
        info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config, None)
        if number is not None:
            info = self._of_layers(info)
        self._refuse_problems(model, info, number)
        info.unexpected_keys.clear()
        self._mark_outer(model)
        # Ties the head to the embedding, and computes buffers that no file holds (rotary
        # frequencies). It would also initialise missing weights, but none are missing.
        PreTrainedModel._finalize_model_loading(model, load_config, info)
        model.train(False).requires_grad_(False)

    def _mark_outer(self, model: PreTrainedModel) -> None:
        """Keep transformers from initialising weights of modules that are absent, by their parent.

        What is in the layers, or holds them, may have buffers to compute.
        """
        for name, module in model.named_modules():
            inside = f"{name}.".startswith(f"{self._path}.")
            beside = not inside and not self._path.startswith(f"{name}.")
            if not name or (beside and not module._parameters and not module._buffers):
                cast(Any, module)._is_hf_initialized = True

    def _refuse_problems(self, model: PreTrainedModel, info: Any, number: int | None) -> None:
        where = self._where if number is None else f"{self._where}, layer {number}"

        def original(name: str) -> str:
            return re.sub(rf"^({re.escape(self._path)}\.)0\b", rf"\g<1>{number}", name)

        fix = (
            "The files are whole: either they were saved without all tensors, or "
            f"{self._described_by} is that of another model. Use another copy of the model."
        )
        for name, error in info.conversion_errors.items():
            logger.debug("%s: %s", where, error)
            raise CheckpointError(
                f"{where}: {original(name)} cannot be made of its tensors: one is missing, or "
                f"their shapes do not fit each other. {fix}"
            )
        for name, shape, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{where}: tensor {original(name)} has shape {list(shape)}, "
                f"{self._described_by} says {list(expected)}. {fix}"
            )
        self._unknown |= set(map(original, info.unexpected_keys))
        tied = model.all_tied_weights_keys
        missing = {name for name in info.missing_keys if tied.get(name, name) in info.missing_keys}
        model._adjust_missing_and_unexpected_keys(info)
        if missing:
            raise CheckpointError(f"{where} lacks tensor {min(map(original, missing))}. {fix}")

    def _warn(self) -> None:
        """Tell of tensors that belong to no part of the model."""
        info: Any = _Keys(self._unknown)
        self._model._adjust_missing_and_unexpected_keys(info)
        if unknown := sorted(info.unexpected_keys):
            logger.warning(
                "%s: %d tensors in the files belong to no part of the model and are left out, such "
                "as %s. If answers are wrong, %s may be that of another model.",
                *(self._where, len(unknown), ", ".join(unknown[:_SHOWN_NAMES])),
                self._described_by,
            )


class _Keys:
    """What transformers' exceptions for unexpected tensors are applied to."""

    def __init__(self, unexpected: set[str]) -> None:
        self.missing_keys: set[str] = set()
        self.unexpected_keys = unexpected


def _shell_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return a copy of a model without layers in which nothing outside the layers has weights."""
    shell = copy.deepcopy(model)
    shell.all_tied_weights_keys = {}
    outside = ["."]
    for name, _ in list(shell.named_modules()):
        if f"{path}.".startswith(f"{name}.") or not name or name.startswith(outside[-1]):
            continue
        _replace(shell, name, nn.Module())
        outside.append(f"{name}.")
    return shell


def _taken(model: nn.Module, slot: Slot) -> Tensor:
    """Return the tensor of a slot; an empty one takes its place."""
    module = model.get_submodule(slot.module)
    tensor = module.get_parameter(slot.name).detach()
    experts = slot.shape[0] if len(slot.shape) > len(("rows", "columns")) else 0
    empty = torch.empty((experts, 0, 0) if experts else (0, 0), dtype=torch.uint8)
    setattr(module, slot.name, nn.Parameter(empty, requires_grad=False))
    return tensor


def _is_transposed(model: nn.Module, parameter: str) -> bool:
    path, _, name = parameter.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    stacks = expert_stacks(module)
    if stacks is not None:
        return stacks.transposed and name in (stacks.up, stacks.down)
    return isinstance(module, Conv1D) and name == "weight"


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Have transformers show no progress bars in this context."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
