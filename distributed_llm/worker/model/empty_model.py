"""Makes models without weights from a config.json, by transformers' own classes."""

import copy
import re
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
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import ENCODER_DECODERS, is_encoder_decoder
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.other_formats import QUANTIZATION_NAMES
from distributed_llm.common.text_config import PART_OF
from distributed_llm.worker.model.attention import ATTENTION_NAME
from distributed_llm.worker.model.fixed_rope import fix_rope
from distributed_llm.worker.model.idle_experts import leave_out_idle_experts
from distributed_llm.worker.model.own_attention import OWN_ATTENTION, use_packed_attention
from distributed_llm.worker.model.sorted_experts import tell_of_sorted_experts
from distributed_llm.worker.model.stacks.attention import STACK_ATTENTION
from distributed_llm.worker.model.stacks.joined import join_stacks
from distributed_llm.worker.model.temperature import tell_positions
from distributed_llm.worker.model.text_classes import WITHOUT_HEAD, class_with_head

_WRONG_FIELD = re.compile(r"[Ff]ield '(\w+)'")
_QUOTED = re.compile(r"[`'](\w+)[`']")
_SHOWN_CHARS = 60


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
        raise UnsupportedModel(
            f"The installed transformers does not know the model type {model_type!r}. Upgrade it "
            "(pip install -U transformers) on every machine; if that does not help, use another "
            "model: code that comes with checkpoints is never run."
        )
    kind = CONFIG_MAPPING[model_type]
    heads = (kind in MODEL_FOR_CAUSAL_LM_MAPPING, model_type in WITHOUT_HEAD)
    if not any((*heads, is_encoder_decoder(config))):
        raise UnsupportedModel(
            f"The model type {model_type!r} is no language model that is known. Use one that "
            "generates text, such as llama, qwen3 or mistral."
        )
    model_sizes.check_sizes(config)  # transformers would begin to make any number of layers
    left_out = {*QUANTIZATION_NAMES, PART_OF}
    kept = {name: value for name, value in config.items() if name not in left_out}
    values = copy.deepcopy(kept)  # transformers writes into what it is given
    for name in ("dtype", "torch_dtype"):
        if isinstance(values.get(name), str):
            values[name] = values[name].removeprefix("torch.")
    try:
        made = kind.from_dict(kind._decode_special_floats(values))  # infinity has no JSON
    except Exception as exc:  # validators of transformers raise errors of many types
        raise CheckpointError(
            f"transformers refuses the config.json of this {model_type!r} model: "
            f"{_what_is_wrong(str(exc), config)}. It is damaged, or for another version of "
            "transformers: copy that of the original model."
        ) from exc
    fix_rope(made, context_length or model_sizes.context_length(config))
    return made


def _what_is_wrong(said: str, config: Mapping[str, Any]) -> str:
    """Return what transformers' validators found, in words for people."""
    if found := _WRONG_FIELD.search(said):
        value = repr(config.get(found[1]))[:_SHOWN_CHARS]
        return f"{found[1]} = {value} is no value for it"
    named = ", ".join(sorted({name for name in _QUOTED.findall(said) if name in config}))
    about = f" ({named[:_SHOWN_CHARS]})" if named else ""
    return f"it has values that its model type does not allow{about}"


def _no_model(model_type: str) -> CheckpointError:
    """Return the error for a configuration that was accepted, and of which no model can be made.

    What transformers raises then is of any type, and speaks of its own code.
    """
    return CheckpointError(
        f"transformers makes no model of the config.json of this {model_type!r} model: sizes or "
        "types in it contradict one another. It is damaged, or for another version of "
        "transformers: copy that of the original model."
    )


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
    try:
        with torch.device("meta"):
            model = new_model(made, dtype)
    except Exception as exc:
        raise _no_model(made.model_type) from exc
    return {
        name: TensorInfo(name, "", names[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in model.state_dict().items()
        if tensor.dtype in names and name not in model.all_tied_weights_keys
    }


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
    except ValueError as exc:
        raise UnsupportedModel(
            f"transformers cannot run the model type {checkpoint.model_type!r} with the attention "
            f"that split models need: {exc}"
        ) from exc
    except Exception as exc:
        raise _no_model(checkpoint.model_type) from exc
    if replaced:
        use_packed_attention(model)
    if stacks:
        join_stacks(model)
    tell_positions(model)
    tell_of_sorted_experts(model)
    return model
