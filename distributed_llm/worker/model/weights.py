"""Loads the part of a Hugging Face model that one stage runs.

The whole model is built on the meta device, where it takes no memory, so that everything that
depends on a layer's number (sliding windows, experts) is as in the whole model. Then all layers but
the stage's are dropped, and modules outside the layers that the stage does not need are replaced by
empty ones. The remaining weights are read from the safetensors files through transformers' own
conversion, which renames, fuses and splits tensors that checkpoints store differently. Modules that
another stage of the same model holds in this process are shared instead (`shared_weights`).
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.types import LayerRange
from distributed_llm.weights.giving.shelf import Place
from distributed_llm.worker.model.empty_model import empty_model
from distributed_llm.worker.model.experts import pack_experts
from distributed_llm.worker.model.kernels import pack_linear_layers, packed_nbytes
from distributed_llm.worker.model.shared_weights import SharedModules, StageModel, shared_nbytes
from distributed_llm.worker.model.tensor_files import Locate, TensorInFile, TensorReader

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 3


class AbsentEmbedding(nn.Module):
    """Stands for an embedding of another stage; its output is replaced or discarded."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._zero = torch.zeros((1, 1, 1), dtype=dtype)
        self._size = size

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros [1, tokens, size]; all are the same element in memory."""
        return self._zero.to(ids.device).expand(1, ids.shape[-1], self._size)


class AbsentModule(nn.Module):
    """Stands for a norm, projection or head of another stage; its output is discarded."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self._size = size

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
    locate: Locate | None = None,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> StageModel:
    """Load the model of a checkpoint, reduced to some layers.

    Args:
        checkpoint: with the weights.
        layers: to load.
        device: of the weights.
        dtype: of the weights.
        donor: a stage of the same checkpoint, device and dtype to share modules with; it may run in
            another thread meanwhile.
        locate: returns where a tensor is, once it is there; None: in the checkpoint's folder.
        on_read: called with bytes of tensors when they were read, in any thread.

    Raises:
        CheckpointUnavailable: a file was cut short meanwhile, or cannot be read just now.
        CheckpointError: tensors are missing, unknown, of the wrong shape, or unreadable.
        UnsupportedModel: the architecture cannot be divided into stages.
    """
    whole = donor.whole if donor else empty_model(checkpoint, dtype)
    model = copy.deepcopy(whole)
    decoder = cast(PreTrainedModel, model.base_model)
    path = _path_of_layers(model, checkpoint.num_layers)
    tied = dict(model.all_tied_weights_keys)
    shared = SharedModules(checkpoint, layers, tied, donor)
    missing = _missing_layers(layers, shared)
    _keep_layers(model, path, missing)
    _cut_config(model.config, checkpoint.num_layers, layers)
    _drop_unneeded(model, path, checkpoint, layers, shared)
    reader = TensorReader(locate or checkpoint_place(checkpoint), on_read)
    with _without_progress_bars():
        tensors = _tensors_to_load(checkpoint, layers, tied, shared, reader)
        _load(model, path, tensors, checkpoint, missing, device=device, dtype=dtype)
        model.train(False).requires_grad_(False)
        _drop_tied_embedding(model, layers)
        pack_experts(model)
        pack_linear_layers(model)
    _insert_shared(model, path, layers, shared)
    kept = cast(nn.ModuleList, model.get_submodule(path))
    shared_bytes = shared_nbytes(model, donor) if donor else 0
    return StageModel(whole, model, decoder, kept, layers, _nbytes(model), shared_bytes)


def _keep_layers(model: PreTrainedModel, path: str, layers: Sequence[int]) -> None:
    """Drop all other layers; those that are kept keep their numbers (`layer_idx`)."""
    whole = cast(nn.ModuleList, model.get_submodule(path))
    _replace(model, path, nn.ModuleList([whole[layer] for layer in layers]))


def _insert_shared(
    model: PreTrainedModel, path: str, layers: LayerRange, shared: SharedModules
) -> None:
    """Insert the shared layers and modules into a model."""
    own = iter(cast(nn.ModuleList, model.get_submodule(path)))
    all_layers = [
        shared.layer(layer) if shared.has_layer(layer) else next(own)
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


def _cut_config(config: PretrainedConfig, num_layers: int, layers: LayerRange) -> None:
    """Reduce the configuration to these layers; the model's forward takes their number from it."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, value[layers.start : layers.stop])
    config.num_hidden_layers = len(layers)


def _drop_unneeded(
    model: PreTrainedModel,
    path: str,
    checkpoint: Checkpoint,
    layers: LayerRange,
    shared: SharedModules,
) -> None:
    """Replace modules outside the layers that are of other stages, or shared, by empty ones."""
    first, last = layers.start == 0, layers.stop == checkpoint.num_layers
    tied = model.all_tied_weights_keys
    separate = not last or not (first or checkpoint.ties_embeddings)
    if separate or any(shared.has(name) for pair in tied.items() for name in pair):
        model.all_tied_weights_keys = {}  # the head is absent, or has a tensor of its own
    tied_to = set(model.all_tied_weights_keys.values())
    inside = {id(m) for m in model.get_submodule(path).modules()}
    for name, module in list(model.named_modules()):
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if not own or id(module) in inside:
            continue
        needed = first if checkpoint.is_embedding(own[0]) else last
        if (not needed and not tied_to.intersection(own)) or shared.has(own[0]):
            _replace(model, name, _absent(module))


def _absent(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return AbsentEmbedding(module.embedding_dim, module.weight.dtype)
    return AbsentModule(module.out_features if isinstance(module, nn.Linear) else None)


def checkpoint_place(checkpoint: Checkpoint) -> Locate:
    """Return a function that returns where a tensor is in the folder of a checkpoint."""
    return lambda info: Place(checkpoint.path_of(info.file), info.offset, info.nbytes)


def _tensors_to_load(
    checkpoint: Checkpoint,
    layers: LayerRange,
    tied: Mapping[str, str],
    shared: SharedModules,
    reader: TensorReader,
) -> dict[str, Any]:
    """Return the tensors to load, by name.

    In the names, the layers that are not shared are numbered from 0. A matrix that stands in the
    files only as the head's gets the name of the embedding that the head is tied to.
    """
    tensors: dict[str, Any] = {}
    missing = _missing_layers(layers, shared)
    for info in checkpoint.tensors_of(layers):
        layer = checkpoint.layer_of(info.name)
        name = tied.get(info.name, info.name) if info.name == checkpoint.lone_head else info.name
        if shared.has(name) if layer is None else shared.has_layer(layer):
            continue
        if (matrix := shared.matrix(name)) is not None:
            tensors[name] = matrix
            continue
        if layer is not None:
            name = _renumbered(name, checkpoint, layer, missing)
        tensors[name] = TensorInFile(reader, info)
    return tensors


def _missing_layers(layers: LayerRange, shared: SharedModules) -> list[int]:
    return [layer for layer in range(layers.start, layers.stop) if not shared.has_layer(layer)]


def _renumbered(name: str, checkpoint: Checkpoint, layer: int, layers: Sequence[int]) -> str:
    rest = name.removeprefix(f"{checkpoint.layer_prefix}.{layer}.")
    return f"{checkpoint.layer_prefix}.{layers.index(layer)}.{rest}"


def _load(
    model: PreTrainedModel,
    path: str,
    tensors: dict[str, Any],
    checkpoint: Checkpoint,
    layers: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    load_config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
    )
    info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config, None)
    _refuse_problems(model, path, info, checkpoint, layers)
    # Ties the head to the embedding, and computes buffers that no file holds (rotary frequencies).
    # It would also initialise missing weights, but none are missing.
    PreTrainedModel._finalize_model_loading(model, load_config, info)


def _refuse_problems(
    model: PreTrainedModel, path: str, info: Any, checkpoint: Checkpoint, layers: Sequence[int]
) -> None:
    where = f"{checkpoint.folder} (layers {_text(layers)} of the {checkpoint.model_type!r} model)"

    def original(name: str) -> str:
        return re.sub(
            rf"^({re.escape(path)}\.)(\d+)",
            lambda match: f"{match[1]}{layers[int(match[2])]}",
            name,
        )

    fix = (
        "The files are whole: either they were saved without all tensors, or config.json is that "
        "of another model. Use another copy of the model."
    )
    for name, error in info.conversion_errors.items():
        last_line = error.strip().splitlines()[-1]
        raise CheckpointError(
            f"{where}: {original(name)} cannot be made of its tensors: {last_line}. {fix}"
        )
    for name, shape, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{where}: tensor {original(name)} has shape {list(shape)}, config.json says "
            f"{list(expected)}. {fix}"
        )
    tied = model.all_tied_weights_keys
    missing = {name for name in info.missing_keys if tied.get(name, name) in info.missing_keys}
    model._adjust_missing_and_unexpected_keys(info)
    if missing:
        raise CheckpointError(f"{where} lacks tensor {min(map(original, missing))}. {fix}")
    if unknown := sorted(map(original, info.unexpected_keys)):
        logger.warning(
            "%s: %d tensors in the files belong to no part of the model and are left out, such as "
            "%s. If answers are wrong, config.json may be that of another model.",
            *(where, len(unknown), ", ".join(unknown[:_SHOWN_NAMES])),
        )


def _text(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _drop_tied_embedding(model: PreTrainedModel, layers: LayerRange) -> None:
    """Remove the embedding that the head is tied to from a stage that only needs the head."""
    if layers.start == 0:
        return
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and id(module.weight) in heads:
            _replace(model, name, _absent(module))


def _nbytes(model: PreTrainedModel) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}  # tied ones once
    return sum(tensor.nbytes for tensor in tensors.values()) + packed_nbytes(model)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
