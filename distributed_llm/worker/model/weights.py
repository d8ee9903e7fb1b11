"""Loads the part of a Hugging Face model that one stage runs.

The whole model is built on the meta device, where it takes no memory, so that everything that
depends on a layer's number (sliding windows, experts) is as in the whole model. Then all layers but
the stage's are dropped, and modules outside the layers that the stage does not need are replaced by
empty ones. The remaining weights are read layer by layer (`layer_loading`). Modules that another
stage of the same model holds in this process are shared instead (`shared_weights`).
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from distributed_llm.common.cache_folder import offload_folder
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import encoder_layers
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.model_sizes import attentions_per_layer
from distributed_llm.common.ngrams import table_part
from distributed_llm.common.offloading import Away
from distributed_llm.common.schemes.bnb import BnbTableScheme
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.worker.model.away_layers import away_nbytes, place_of
from distributed_llm.worker.model.device_buffers import bring_one_ahead, move_to_ram
from distributed_llm.worker.model.device_copies import copies_to
from distributed_llm.worker.model.empty_model import empty_model
from distributed_llm.worker.model.fast_norms import replace_norms
from distributed_llm.worker.model.incoming import Entry, Piece, WeightReader
from distributed_llm.worker.model.kernels import only_plain, pack_linear_layers, packed_nbytes
from distributed_llm.worker.model.layer_cuts import LayerCut
from distributed_llm.worker.model.layer_loading import ModelLoader
from distributed_llm.worker.model.offload import move_to_disk, read_one_ahead
from distributed_llm.worker.model.reading_ahead import ReadingAhead
from distributed_llm.worker.model.shared_blocks import (
    holders_of,
    leave_out_blocks,
    share_blocks,
)
from distributed_llm.worker.model.shared_weights import SharedModules, StageModel, shared_nbytes
from distributed_llm.worker.model.stacks.joined import drop_unread, link_stacks
from distributed_llm.worker.model.stacks.positions import AbsentPositions, LearnedPositions
from distributed_llm.worker.model.tensor_files import Locate, TensorReader
from distributed_llm.worker.model.weight_names import WeightNames

_EMBED_IN_PLACE = frozenset({"ctrl"})
"""Model types that scale embeddings in place."""


class AbsentEmbedding(nn.Module):
    """Stands for an embedding of another stage; its output is replaced or discarded."""

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, *, writable: bool
    ) -> None:
        super().__init__()
        self._zero = torch.zeros((1, 1, 1), dtype=dtype, device=device)
        self._size = size
        self._writable = writable

    @property
    def weight(self) -> Tensor:
        """A tensor where that of an embedding would be, which tells models the device."""
        return self._zero

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros [1, tokens, size]; unless writable, all are one element in memory."""
        zeros = self._zero.to(ids.device).expand(1, ids.shape[-1], self._size)
        return zeros.clone(memory_format=torch.contiguous_format) if self._writable else zeros


class AbsentModule(nn.Module):
    """Stands for a norm, projection or head of another stage; its output is discarded."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self._size = size

    @property
    def weight(self) -> Tensor:
        """A tensor where that of the module would be, of which some models ask the dtype."""
        return torch.empty(0)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input, or zeros as wide as the output of the module would be."""
        if self._size is None:
            return states
        return states.new_zeros(()).expand(*states.shape[:-1], self._size)


def load_stage_model(
    checkpoint: Checkpoint,
    layers: LayerRange,
    *,
    device: torch.device,
    dtype: torch.dtype,
    donor: StageModel | None = None,
    quantize: Quantize = "none",
    locate: Locate | None = None,
    on_read: Callable[[int], None] = lambda nbytes: None,
    gone: Away | None = None,
) -> StageModel:
    """Load the model of a checkpoint, reduced to some layers.

    Args:
        checkpoint: with the weights.
        layers: to load.
        device: of the weights.
        dtype: of the weights.
        donor: a stage of the same checkpoint, device and dtype to share modules with; it may run in
            another thread meanwhile.
        quantize: what floating-point matrices of layers become.
        locate: returns where a tensor is, once it is there; None: in the checkpoint's folder.
        on_read: called with bytes of tensors when they were read, in any thread.
        gone: layers whose weights stay on the disk, or in the machine's memory beside a GPU; those
            of the donor stay where they are.

    Raises:
        NotEnoughMemory: the disk is full, or memory cannot be locked.
        CheckpointUnavailable: a file was cut short meanwhile, or cannot be read just now.
        CheckpointError: tensors are missing, unknown, of the wrong shape, or unreadable.
        UnsupportedModel: the architecture cannot be divided into stages.
    """
    whole = donor.whole if donor else empty_model(checkpoint, dtype)
    model = copy.deepcopy(whole)
    decoder = cast(PreTrainedModel, model.base_model)
    path = _path_of_layers(model, checkpoint.num_layers)
    tied = _tied_outside(model, path)
    names = WeightNames(checkpoint, whole, path)
    shared = SharedModules(checkpoint, layers, tied, donor, names.parameter)
    holders = holders_of(checkpoint.block_sources, layers, shared.has_layer)
    numbers = _missing_layers(layers, shared)
    empty_layers = _take_layers(model, path, numbers)
    leave_out_blocks(
        dict(zip(numbers, empty_layers, strict=True)), checkpoint.block_sources, holders
    )
    _drop_unneeded(model, checkpoint, layers, shared, device)
    if checkpoint.stacks is not None:
        of_head = {name for name in checkpoint.weights if checkpoint.outer.is_used_by(layers, name)}
        drop_unread(model, unless_in=of_head)
    cut = LayerCut(checkpoint.outer.per_layer_width, layers)
    cut.shrink_modules(model)
    entries, matrices = _entries(checkpoint, layers, tied, shared, names, holders)
    own = []
    gone, copies = gone or Away(), copies_to(device)
    with ReadingAhead(locate or checkpoint_place(checkpoint), on_read) as tensors:
        loader = ModelLoader(
            *(model, path, checkpoint),
            WeightReader(tensors),
            lambda weight: checkpoint.form_of(weight, quantize),
            device=device,
            dtype=dtype,
        )
        for number, layer, after in zip(numbers, empty_layers, [*numbers, None][1:], strict=True):
            parts = _parts(entries.get(after, []))
            with only_plain(number in gone.on_disk):
                own.append(
                    loader.load_layer(
                        *(layer, number, entries.get(number, [])),
                        when_read=functools.partial(tensors.read_ahead, parts),
                    )
                )
            if number in gone.on_disk:
                move_to_disk(own[-1], offload_folder())
            elif number in gone.in_ram:
                assert copies is not None  # only of such devices layers stay there
                move_to_ram(own[-1], copies)
        loader.load_outer(entries.get(None, []), matrices, cut)
    _cut_config(checkpoint, model.config, layers)
    if not checkpoint.outer.embeds(layers):
        _drop_tied_embedding(model, device)
    pack_linear_layers(model)
    replace_norms(model)
    _insert_shared(model, path, layers, shared, own)
    kept = cast(nn.ModuleList, model.get_submodule(path))
    share_blocks(dict(enumerate(kept, layers.start)), checkpoint.block_sources, holders)
    if checkpoint.stacks is not None:
        encoders = min(encoder_layers(checkpoint.config), layers.stop) - layers.start
        link_stacks(model, max(0, encoders), device)
    saved = bring_one_ahead(kept, copies) if copies else read_one_ahead(kept)
    nbytes = _nbytes(model) - saved
    shared_bytes = _shared_in_memory(model, kept, donor) if donor else 0
    return StageModel(whole, model, decoder, kept, layers, nbytes, shared_bytes)


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise what loading all layers of a checkpoint would raise, as far as shapes and names tell.

    Takes some hundredths of a second per layer. Of the files, only small parts are read that say
    how others are meant, if they are on this machine.

    Raises:
        CheckpointError: tensors are missing, unknown, of the wrong shape, or contradict others.
        UnsupportedModel: the architecture cannot be divided into stages.
    """
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    here = all(checkpoint.path_of(file).exists() for file in files)
    schemes = (weight.scheme for weight in checkpoint.weights.values())
    if not here and any(isinstance(scheme, BnbTableScheme) for scheme in schemes):
        return  # shapes are in the files alone
    model = empty_model(checkpoint, torch.bfloat16)
    whole = copy.deepcopy(model)
    layers = LayerRange(0, checkpoint.num_layers)
    path = _path_of_layers(model, checkpoint.num_layers)
    tied = _tied_outside(model, path)
    names = WeightNames(checkpoint, whole, path)
    shared = SharedModules(checkpoint, layers, tied, None, names.parameter)
    holders = holders_of(checkpoint.block_sources, layers, shared.has_layer)
    empty_layers = _take_layers(model, path, range(checkpoint.num_layers))
    leave_out_blocks(dict(enumerate(empty_layers)), checkpoint.block_sources, holders)
    _drop_unneeded(model, checkpoint, layers, shared, torch.device("meta"))
    entries, _ = _entries(checkpoint, layers, tied, shared, names, holders)
    reader = WeightReader(TensorReader(checkpoint_place(checkpoint), lambda nbytes: None))
    loader = ModelLoader(
        *(model, path, checkpoint, reader.of_shapes(here=here), lambda weight: None),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
    )
    for number, layer in enumerate(empty_layers):
        loader.check_layer(layer, number, entries.get(number, []))
    loader.load_outer(entries.get(None, []), {}, LayerCut(checkpoint.outer.per_layer_width, layers))


def _parts(entries: Iterable[Entry]) -> list[TensorInfo]:
    """Return the tensors that weights are made of."""
    weights = (piece.weight for entry in entries for piece in entry.pieces)
    return [part for weight in weights for part in weight.parts.values()]


def _tied_outside(model: PreTrainedModel, path: str) -> dict[str, str]:
    """Return the names of tied parameters outside the layers, and have the model know no others.

    What layers have in common is tied here otherwise (`shared_blocks`).
    """
    tied = {
        name: original
        for name, original in model.all_tied_weights_keys.items()
        if not name.startswith(f"{path}.")
    }
    model.all_tied_weights_keys = tied
    return dict(tied)


def _take_layers(model: PreTrainedModel, path: str, numbers: Iterable[int]) -> list[nn.Module]:
    """Take all layers out of a model, and return some; they keep their numbers (`layer_idx`)."""
    whole = cast(nn.ModuleList, model.get_submodule(path))
    _replace(model, path, nn.ModuleList())
    return [whole[number] for number in numbers]


def _insert_shared(
    model: PreTrainedModel,
    path: str,
    layers: LayerRange,
    shared: SharedModules,
    own: Iterable[nn.Module],
) -> None:
    """Insert the layers of a model, and what it shares."""
    loaded = iter(own)
    all_layers = [
        shared.layer(layer) if shared.has_layer(layer) else next(loaded)
        for layer in range(layers.start, layers.stop)
    ]
    _replace(model, path, nn.ModuleList(all_layers))
    for name, module in shared.modules():
        _replace(model, name, module)


def _replace(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _path_of_layers(model: PreTrainedModel, num_layers: int) -> str:
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not paths:
        raise UnsupportedModel(
            f"The model type {model.config.model_type!r} has no list of {num_layers} layers that "
            "could be cut into stages. Use another model."
        )
    return str(min(paths, key=lambda path: path.count(".")))


def _cut_config(checkpoint: Checkpoint, config: PretrainedConfig, layers: LayerRange) -> None:
    """Reduce the configuration to these layers; the model's forward takes their number from it."""
    num_layers, attentions = checkpoint.num_layers, attentions_per_layer(checkpoint.config)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, value[layers.start : layers.stop])
    config.num_hidden_layers = len(layers) * attentions


def _drop_unneeded(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    layers: LayerRange,
    shared: SharedModules,
    device: torch.device,
) -> None:
    """Replace modules outside the layers that are of other stages, or shared, by empty ones."""
    first, last = checkpoint.outer.embeds(layers), layers.stop == checkpoint.num_layers
    tied = model.all_tied_weights_keys
    separate = not last or not (first or checkpoint.outer.ties_embeddings)
    if separate or any(shared.has(name) for pair in tied.items() for name in pair):
        model.all_tied_weights_keys = {}  # the head is absent, or has a tensor of its own
    tied_to = set(model.all_tied_weights_keys.values())
    dropped: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if not own or name.startswith(dropped):
            continue
        needed = checkpoint.outer.is_used_by(layers, own[0])
        if (not needed and not tied_to.intersection(own)) or shared.has(own[0]):
            _replace(model, name, _absent(module, device, model.config.model_type))
            dropped = (*dropped, f"{name}.")


def _absent(module: nn.Module, device: torch.device, model_type: str) -> nn.Module:
    if isinstance(module, nn.Embedding):
        writable = model_type in _EMBED_IN_PLACE
        return AbsentEmbedding(module.embedding_dim, module.weight.dtype, device, writable=writable)
    if isinstance(module, LearnedPositions):
        return AbsentPositions()
    return AbsentModule(module.out_features if isinstance(module, nn.Linear) else None)


def checkpoint_place(checkpoint: Checkpoint) -> Locate:
    """Return a function that returns where a tensor is in the folder of a checkpoint."""
    return lambda info: Place(checkpoint.path_of(info.file), info.offset, info.nbytes)


def _entries(
    checkpoint: Checkpoint,
    layers: LayerRange,
    tied: Mapping[str, str],
    shared: SharedModules,
    names: WeightNames,
    holders: Mapping[int, int],
) -> tuple[dict[int | None, list[Entry]], dict[str, Tensor]]:
    """Return what is to be read, by layer (None: outside the layers), and the donor's matrices.

    In the names, each layer's number is 0. A matrix that stands in the files only as the head's
    gets the name of the embedding that the head is tied to. Shared blocks are read for the layers
    that hold them.
    """
    pieces: dict[int | None, dict[str, dict[int, Piece]]] = {}
    matrices: dict[str, Tensor] = {}
    for weight in checkpoint.weights_of(layers):
        layer = checkpoint.layer_of(weight.name)
        if (block := checkpoint.block_of(weight.name)) is not None:
            if block not in holders:
                continue
            layer = holders[block]
        for target in names.targets(weight.name):
            name = names.name(weight.name, target)
            if weight.name == checkpoint.outer.lone_head:
                name = tied.get(name, name)
            if shared.has(name) if layer is None else shared.has_layer(layer):
                continue
            if layer is None and (matrix := shared.matrix(name)) is not None:
                matrices[name] = matrix
                continue
            own = pieces.setdefault(layer, {}).setdefault(name, {})
            part = table_part(weight.name)
            place = target.piece if target else part[1] if part else 0
            own[place] = Piece(weight, target)
    entries = {
        layer: [Entry(name, tuple(own[i] for i in sorted(own))) for name, own in by_name.items()]
        for layer, by_name in pieces.items()
    }
    return entries, matrices


def _missing_layers(layers: LayerRange, shared: SharedModules) -> list[int]:
    return [layer for layer in range(layers.start, layers.stop) if not shared.has_layer(layer)]


def _drop_tied_embedding(model: PreTrainedModel, device: torch.device) -> None:
    """Remove the embedding that the head is tied to from a stage that only needs the head."""
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and id(module.weight) in heads:
            _replace(model, name, _absent(module, device, model.config.model_type))


def _shared_in_memory(model: PreTrainedModel, layers: nn.ModuleList, donor: StageModel) -> int:
    """Return the bytes of the device's memory that are shared with the donor."""
    theirs = [place_of(layer) for layer in donor.layers]
    return shared_nbytes(model, donor) - away_nbytes(
        layer for layer in layers if place_of(layer) in theirs
    )


def _nbytes(model: PreTrainedModel) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}  # tied ones once
    return sum(tensor.nbytes for tensor in tensors.values()) + packed_nbytes(model)
