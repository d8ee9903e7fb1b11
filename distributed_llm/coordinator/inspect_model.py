"""Reads a `ServedModel` from a checkpoint: headers and samples of tensors, no whole weights."""

from collections.abc import Mapping
from dataclasses import replace

from distributed_llm.common.architectures import EXCEEDS_FLOAT16
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import encoder_layers
from distributed_llm.common.formats import formats_of
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.layer_sharing import uncut
from distributed_llm.common.layer_windows import layer_windows
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_folder import read_generation_config
from distributed_llm.common.ngrams import table_part
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.weight_forms import QUANTIZE_LEVELS, Quantize
from distributed_llm.common.workspace import workspace_bytes
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.model_cost import ModelCost
from distributed_llm.coordinator.requests.generation_config import generation_defaults


def served_model(
    source: ModelSource,
    checkpoint: Checkpoint,
    settings: CoordinatorSettings,
    prints: Mapping[str, str],
) -> ServedModel:
    """Return the served model of a checkpoint.

    Args:
        source: where workers find it.
        checkpoint: config and tensor names; weights need not be on this machine.
        settings: with the dtypes to run it in.
        prints: fingerprints of all tensors; without them no digest can be asked for.

    Raises:
        CheckpointError: the files contradict one another, or one has a value out of range.
    """
    if settings.max_context != "auto":
        checkpoint = checkpoint.limited_to(settings.max_context)
    dtype = checkpoint.dtype if settings.dtype == "auto" else settings.dtype
    first = "none" if settings.quantize == "auto" else settings.quantize
    levels = QUANTIZE_LEVELS[QUANTIZE_LEVELS.index(first) :]
    workspace = workspace_bytes(
        checkpoint.config,
        dtype,
        vocab_size=checkpoint.vocab_size,
        tokens=max(settings.max_batch_tokens, checkpoint.context_length * bool(checkpoint.stacks)),
        rows=settings.max_batch_sequences,
    )
    costs = [
        replace(model_cost(checkpoint, dtype, level, settings.kv_dtype), workspace_bytes=workspace)
        for level in levels
    ]
    defaults = generation_defaults(
        checkpoint.config,
        read_generation_config(checkpoint.folder),
        context_length=checkpoint.context_length,
        vocab_size=checkpoint.vocab_size,
    )
    return ServedModel(
        name=source.name or "built-in",
        source=source,
        dtype=dtype,
        wire_dtype=dtype if settings.wire_dtype == "auto" else settings.wire_dtype,
        kv_dtype=settings.kv_dtype,
        cost=costs[0],
        smaller=tuple(costs[1:]),
        may_shrink=settings.quantize == "auto",
        exceeds_float16=checkpoint.model_type in EXCEEDS_FLOAT16,
        formats={one.quantize: formats_of(checkpoint, dtype, one.quantize) for one in costs},
        hidden_size=checkpoint.hidden_size,
        source_size=checkpoint.source_size if costs[0].encoder_layers else 0,
        defaults=defaults,
        digest=lambda layers: checkpoint.digest(layers, prints),
        model_type=checkpoint.model_type,
        architecture=checkpoint.architecture,
        num_parameters=checkpoint.num_parameters,
    )


def model_cost(
    checkpoint: Checkpoint,
    dtype: DtypeName,
    quantize: Quantize = "none",
    kv_dtype: KVDtype = "auto",
) -> ModelCost:
    """Return the memory that the parts of a checkpoint take when run in `dtype`.

    Args:
        checkpoint: config and tensor names.
        dtype: of what stays floating-point numbers.
        quantize: what other floating-point numbers become.
        kv_dtype: how keys and values are kept.

    Raises:
        CheckpointError: tensors of some layers are missing.
    """
    num_layers = checkpoint.num_layers
    layers, tables = [0] * num_layers, [0] * num_layers
    beside = {"first": 0, "last": 0, "shared": 0, "each": 0, "tables": 0}
    for weight in checkpoint.weights.values():
        layer = checkpoint.layer_of(weight.name)
        size = checkpoint.weight_bytes(weight, dtype, quantize)
        whose = _whose(checkpoint, weight.name) if layer is None else layer
        if isinstance(whose, int):
            layers[whose] += size
            tables[whose] += size if table_part(weight.name) else 0
        else:
            beside[whose] += size
    of_each = beside["tables"] // num_layers
    return ModelCost(
        layer_bytes=tuple(own + of_each for own in layers),
        first_bytes=beside["first"],
        last_bytes=beside["last"],
        shared_bytes=beside["shared"],
        each_bytes=beside["each"],
        table_bytes=tuple(own + of_each for own in tables),
        uncut=uncut(checkpoint.config, num_layers),
        layer_kv_bytes=checkpoint.layer_kv_bytes(dtype, kv_dtype),
        quantize=quantize,
        windows=layer_windows(checkpoint.config, num_layers),
        layer_state_bytes=checkpoint.layer_state_bytes(dtype),
        shared_by=checkpoint.outer.embedding_users if checkpoint.stacks else (),
        encoder_layers=encoder_layers(checkpoint.config),
    )


def _whose(checkpoint: Checkpoint, name: str) -> str | int:
    """Return which stages need a weight outside the layers; "tables": their part.

    A number: those with that layer.
    """
    if checkpoint.outer.is_of_every_stage(name):
        return "tables" if checkpoint.outer.is_cut(name) else "each"
    users = checkpoint.outer.users_of(name)
    if checkpoint.outer.is_tied(name) or len(users) > 1:
        return "shared"
    (user,) = users
    return {0: "first", checkpoint.num_layers - 1: "last"}.get(user, user)
