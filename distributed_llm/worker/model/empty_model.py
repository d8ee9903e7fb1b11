"""Makes models without weights from a config.json, by transformers' own classes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from distributed_llm.common import model_sizes
from distributed_llm.common.architectures import generates_nothing, unknown_type
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import (
    ENCODER_DECODERS,
    StackNames,
    is_encoder_decoder,
)
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.other_formats import QUANTIZATION_NAMES
from distributed_llm.common.text_config import PART_OF
from distributed_llm.worker.model.attention import ATTENTION_NAME
from distributed_llm.worker.model.config_faults import refused
from distributed_llm.worker.model.fixed_rope import fix_rope
from distributed_llm.worker.model.idle_experts import leave_out_idle_experts
from distributed_llm.worker.model.ngram_layers import derive_from_config
from distributed_llm.worker.model.own_attention import OWN_ATTENTION, use_packed_attention
from distributed_llm.worker.model.rwkv_blocks import use_layers_with_caches
from distributed_llm.worker.model.sorted_experts import tell_of_sorted_experts
from distributed_llm.worker.model.stacks.attention import STACK_ATTENTION
from distributed_llm.worker.model.stacks.joined import join_stacks
from distributed_llm.worker.model.temperature import tell_positions
from distributed_llm.worker.model.text_classes import WITHOUT_HEAD, class_with_head
from distributed_llm.worker.model.xlstm_blocks import use_xlstm_with_caches
from distributed_llm.worker.model.zaya_layers import put_router_states_beside

_DTYPES = ("dtype", "torch_dtype")


def model_config(config: Mapping[str, Any], context_length: int | None = None) -> PretrainedConfig:
    """Return transformers' configuration object for the content of a config.json.

    Not what it says about quantized weights: to transformers, they are floating-point numbers. And
    rotary positions are the same for all texts (`fix_rope`).

    Args:
        config: the content of config.json.
        context_length: positions of the longest text that is served; None: that of the model.

    Raises:
        UnsupportedModel: transformers has no decoder of this type.
        CheckpointError: transformers refuses a value, or a size is impossible.
    """
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise unknown_type(model_type)
    kind = CONFIG_MAPPING[model_type]
    heads = (kind in MODEL_FOR_CAUSAL_LM_MAPPING, model_type in WITHOUT_HEAD)
    if not any((*heads, is_encoder_decoder(config))):
        raise generates_nothing(model_type)
    model_sizes.check_sizes(config)  # transformers would begin to make any number of layers
    left_out = {*QUANTIZATION_NAMES, PART_OF}
    kept = {name: value for name, value in config.items() if name not in left_out}
    values = copy.deepcopy(kept)  # transformers writes into what it is given
    values.setdefault("pad_token_id", getattr(kind, "pad_token_id", None))
    _leave_out_what_is_not_used(values)
    try:
        made = kind.from_dict(kind._decode_special_floats(values))  # infinity has no JSON
    except Exception as exc:  # validators of transformers raise errors of many types
        raise refused("refuses", config, exc) from exc
    fix_rope(made, context_length or model_sizes.context_length(config))
    return made


def _leave_out_what_is_not_used(values: dict[str, Any]) -> None:
    """Leave out a dtype that is none, as weights have their own, and padding that is no token.

    Of parts as well that are described by themselves.
    """
    for name in _DTYPES:
        named = str(values.get(name)).removeprefix("torch.")
        if isinstance(getattr(torch, named, None), torch.dtype):
            values[name] = named
        else:
            values.pop(name, None)
    padding, vocab_size = values.get("pad_token_id"), values.get("vocab_size")
    if type(padding) is int and type(vocab_size) is int and not 0 <= padding < vocab_size:
        values["pad_token_id"] = None
    for part in values.values():
        if isinstance(part, dict):
            _leave_out_what_is_not_used(part)


def new_model(config: PretrainedConfig, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """Return a model of this configuration, with weights as transformers initialises them."""
    of_config: Any = type(config)
    if config.model_type in ENCODER_DECODERS:
        kind: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[of_config]
    else:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(of_config, None) or class_with_head(of_config)
    model: PreTrainedModel = kind._from_config(config, dtype=dtype, **settings)
    leave_out_idle_experts(model)
    return model


def parameters_of(config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return the tensors that a checkpoint with this config.json would have, tied ones once.

    Raises:
        UnsupportedModel: transformers has no decoder of this type.
        CheckpointError: transformers refuses a value.
    """
    made = model_config(config)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    dtype = made.dtype if made.dtype in names else torch.float32
    model = _meta_model(made, dtype, config)
    tied, state = set(model.all_tied_weights_keys), model.state_dict()
    if is_encoder_decoder(config):
        stacks = StackNames.of_files(config, state)
        state = {name: tensor for name, tensor in state.items() if stacks.holds(name)}
        if config.get("tie_word_embeddings") is False:  # T5's class ties them all the same
            tied -= {name for name in tied if name.startswith("lm_head.")}
    return {
        name: TensorInfo(name, "", names[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in state.items()
        if tensor.dtype in names and name not in tied
    }


def _meta_model(
    made: PretrainedConfig, dtype: torch.dtype, config: Mapping[str, Any]
) -> PreTrainedModel:
    """Return a model on the meta device, as transformers has it.

    Args:
        made: of `config`.
        dtype: of its weights.
        config: the content of config.json.

    Raises:
        CheckpointError: values in it contradict one another.
    """
    try:
        with torch.device("meta"):
            return new_model(made, dtype)
    except Exception as exc:
        raise refused("makes no model of", config, exc) from exc


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole model of a checkpoint on the meta device, with the attention of stages.

    Raises:
        UnsupportedModel: transformers cannot run it with that attention.
        CheckpointError: transformers refuses a value of its config.json.
    """
    config = model_config(checkpoint.config, checkpoint.context_length)
    replaced = config.model_type in OWN_ATTENTION
    stacks = config.model_type in ENCODER_DECODERS
    try:
        with torch.device("meta"):
            kind = "eager" if replaced else STACK_ATTENTION if stacks else ATTENTION_NAME
            model = new_model(config, dtype, attn_implementation=kind)
    except Exception as exc:
        _meta_model(config, dtype, checkpoint.config)  # raises if attention is not the reason
        raise UnsupportedModel(
            f"transformers cannot run the model type {checkpoint.model_type!r} with the attention "
            f"that split models need: {exc}"
        ) from exc
    if replaced:
        use_packed_attention(model)
    if stacks:
        join_stacks(model)
    derive_from_config(model)
    tell_positions(model)
    use_layers_with_caches(model)
    use_xlstm_with_caches(model)
    put_router_states_beside(model)
    tell_of_sorted_experts(model)
    return model
