"""Loads the part of a Hugging Face model that one stage runs.

The whole model is built on the meta device, where it takes no memory, so that whatever depends on
a layer's number (sliding windows, which layers have experts) is as in the whole model. Then all
layers but the stage's are dropped, modules outside the layers whose weights the stage does not need
are replaced by empty ones, and the rest is read from the safetensors files through transformers'
own conversion, which renames, fuses and splits what checkpoints store differently. What another
stage of the same model holds in this process already is not read but shared (`lending.py`).
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.attention import ATTENTION_NAME
from distributed_llm.worker.model.kernels import pack_linear_layers, packed_nbytes
from distributed_llm.worker.model.shared_weights import Loan, StageModel, shared_nbytes

logger = logging.getLogger(__name__)


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that another stage holds; its output is replaced or thrown away."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._zero = torch.zeros((1, 1, 1), dtype=dtype)
        self._size = size

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros [1, tokens, size] that take no memory."""
        return self._zero.to(ids.device).expand(1, ids.shape[-1], self._size)


class AbsentModule(nn.Module):
    """Stands for a norm, projection or head of another stage; its output is thrown away."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self._size = size

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the states, or zeros of the width that the module would have given them."""
        if self._size is None:
            return states
        return states.new_zeros(()).expand(*states.shape[:-1], self._size)


def model_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Return transformers' configuration object for the content of a config.json.

    Raises:
        UnsupportedModel: transformers knows no decoder of this type.
        CheckpointError: a value in it is wrong.
    """
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"The installed transformers does not know the model type {model_type!r}. Upgrade it "
            "(pip install -U transformers) on every machine; if that does not help, use another "
            "model: code that comes with checkpoints is never run."
        )
    kind = CONFIG_MAPPING[model_type]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"The model type {model_type!r} is no decoder language model. Use one that generates "
            "text, such as llama, qwen3 or mistral."
        )
    try:
        return kind.from_dict(dict(config))
    except Exception as exc:  # validators of transformers raise errors of many types
        raise CheckpointError(
            f"transformers refuses the config.json of this {model_type!r} model: {exc}"
        ) from exc


def new_model(config: PretrainedConfig, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """Return the model of this configuration, its weights as transformers initialises them."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind._from_config(config, dtype=dtype, **settings)
    return model


def load_stage_model(
    checkpoint: Checkpoint,
    layers: LayerRange,
    *,
    device: torch.device,
    dtype: torch.dtype,
    donor: StageModel | None = None,
) -> StageModel:
    """Return the model of `checkpoint` cut down to `layers`, with their weights.

    Weights are read from memory-mapped files and copied once. Using the mapped memory itself would
    save the copy, but then the first step would wait for the disk, a file that is shortened under
    us would kill the process, and a tensor would start at any address, which costs vector loads.

    Args:
        donor: a stage of the same checkpoint, device and dtype; what it holds is shared with it.
            It may run in another thread meanwhile.

    Raises:
        CheckpointError: tensors are missing, too many, of the wrong shape, or unreadable.
        UnsupportedModel: the architecture cannot be cut.
    """
    whole = donor.whole if donor else _empty_model(checkpoint, dtype)
    model = copy.deepcopy(whole)
    decoder = cast(PreTrainedModel, model.base_model)
    path = _path_of_layers(model, checkpoint.num_layers)
    loan = Loan(checkpoint, layers, model.all_tied_weights_keys, donor)
    missing = _missing_layers(layers, loan)
    _keep_layers(model, path, missing)
    _cut_config(model.config, checkpoint.num_layers, layers)
    _drop_unneeded(model, path, checkpoint, layers, loan)
    with ExitStack() as files, _without_progress_bars():
        tensors, mapped = _open_tensors(checkpoint, layers, loan, files)
        _load(model, path, tensors, checkpoint, missing, device=device, dtype=dtype)
        model.train(False).requires_grad_(False)
        _drop_tied_embedding(model, layers)
        pack_linear_layers(model)  # reads the mapped memory: those weights are copied only once
        _own_memory(model, mapped)
    _borrow(model, path, layers, loan)
    kept = cast(nn.ModuleList, model.get_submodule(path))
    shared = shared_nbytes(model, donor) if donor else 0
    return StageModel(whole, model, decoder, kept, layers, _nbytes(model), shared)


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    config = model_config(checkpoint.config)
    try:
        with torch.device("meta"):
            return new_model(config, dtype, attn_implementation=ATTENTION_NAME)
    except ValueError as exc:
        raise UnsupportedModel(
            f"transformers cannot run the model type {checkpoint.model_type!r} with the attention "
            f"that split models need: {exc}"
        ) from exc


def _keep_layers(model: PreTrainedModel, path: str, layers: Sequence[int]) -> None:
    """Drop all layers but these; the modules keep the numbers that they have in the whole model."""
    whole = cast(nn.ModuleList, model.get_submodule(path))
    _replace(model, path, nn.ModuleList([whole[layer] for layer in layers]))


def _borrow(model: PreTrainedModel, path: str, layers: LayerRange, loan: Loan) -> None:
    """Put what is lent where it belongs."""
    own = iter(cast(nn.ModuleList, model.get_submodule(path)))
    together = [
        loan.layer(layer) if loan.has_layer(layer) else next(own)
        for layer in range(layers.start, layers.stop)
    ]
    _replace(model, path, nn.ModuleList(together))
    for name, module in loan.modules():
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
    """Make the model's forward, which counts layers by its configuration, run only these."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, value[layers.start : layers.stop])
    config.num_hidden_layers = len(layers)


def _drop_unneeded(
    model: PreTrainedModel, path: str, checkpoint: Checkpoint, layers: LayerRange, loan: Loan
) -> None:
    """Empty the modules outside the layers whose weights are elsewhere, or lent."""
    first, last = layers.start == 0, layers.stop == checkpoint.num_layers
    tied = model.all_tied_weights_keys
    separate = not last or not (first or checkpoint.ties_embeddings)
    if separate or any(loan.has(name) for pair in tied.items() for name in pair):
        model.all_tied_weights_keys = {}  # the head is elsewhere, or has a tensor of its own
    tied_to = set(model.all_tied_weights_keys.values())
    inside = {id(m) for m in model.get_submodule(path).modules()}
    for name, module in list(model.named_modules()):
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if not own or id(module) in inside:
            continue
        needed = first if checkpoint.is_embedding(own[0]) else last
        if (not needed and not tied_to.intersection(own)) or loan.has(own[0]):
            _replace(model, name, _absent(module))


def _absent(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return AbsentEmbedding(module.embedding_dim, module.weight.dtype)
    return AbsentModule(module.out_features if isinstance(module, nn.Linear) else None)


class _MappedTensor:
    """A tensor of a safetensors file, read when transformers' loader slices it."""

    def __init__(self, file: Any, name: str, mapped: set[int]) -> None:
        self._file = file
        self._name = name
        self._mapped = mapped

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._name)
        self._mapped.add(tensor.untyped_storage().data_ptr())
        return tensor[index]


def _open_tensors(
    checkpoint: Checkpoint, layers: LayerRange, loan: Loan, files: ExitStack
) -> tuple[dict[str, Any], set[int]]:
    """Return the tensors to be loaded, by name, and where those of the files will be mapped.

    Layers are counted from 0, those that are lent left out.
    """
    opened: dict[str, Any] = {}
    mapped: set[int] = set()
    tensors: dict[str, Any] = {}
    missing = _missing_layers(layers, loan)
    for info in checkpoint.tensors_of(layers):
        layer = checkpoint.layer_of(info.name)
        if loan.has(info.name) if layer is None else loan.has_layer(layer):
            continue
        if (matrix := loan.matrix(info.name)) is not None:
            tensors[info.name] = matrix
            continue
        if info.file not in opened:
            path = checkpoint.folder / info.file
            try:
                opened[info.file] = files.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as exc:
                raise CheckpointError(f"{path} cannot be read: {exc}. Download it again.") from exc
        name = info.name if layer is None else _renumbered(info.name, checkpoint, layer, missing)
        tensors[name] = _MappedTensor(opened[info.file], info.name, mapped)
    return tensors, mapped


def _missing_layers(layers: LayerRange, loan: Loan) -> list[int]:
    return [layer for layer in range(layers.start, layers.stop) if not loan.has_layer(layer)]


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
    # Ties the head to the embedding and computes buffers that no file holds (rotary frequencies).
    # Nothing is missing, so it has no weights to make up.
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

    fix = "The checkpoint is incomplete or belongs to another config.json; download it again."
    for name, error in info.conversion_errors.items():
        last_line = error.strip().splitlines()[-1]
        raise CheckpointError(
            f"{where}: {original(name)} cannot be made of its tensors: {last_line}. {fix}"
        )
    for name, found, expected in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"{where}: tensor {original(name)} has shape {list(found)}, config.json says "
            f"{list(expected)}. {fix}"
        )
    tied = model.all_tied_weights_keys
    missing = {name for name in info.missing_keys if tied.get(name, name) in info.missing_keys}
    model._adjust_missing_and_unexpected_keys(info)
    for kind, names in (("lacks", missing), ("has the unknown", info.unexpected_keys)):
        if names:
            raise CheckpointError(f"{where} {kind} tensor {min(map(original, names))}. {fix}")


def _text(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _drop_tied_embedding(model: PreTrainedModel, layers: LayerRange) -> None:
    """Leave the tensor of a tied head to the head alone on a stage that embeds nothing."""
    if layers.start == 0:
        return
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and id(module.weight) in heads:
            _replace(model, name, _absent(module))


def _own_memory(model: PreTrainedModel, mapped: set[int]) -> None:
    """Copy, one after the other, parameters that still lie in the mapped files."""
    for parameter in model.parameters():
        if parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()


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
