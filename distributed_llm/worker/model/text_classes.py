"""Text models of which transformers has the layers, but no class with a head.

transformers runs them as a part of a model for pictures or sound as well. Here they get a head of
their own. Their positions may have several axes, for pictures; of text all are alike, and the
layers make them of one.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter
from transformers.modeling_outputs import CausalLMOutputWithPast

WITHOUT_HEAD = frozenset(
    {
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "mistral4",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)
"""Model types that get a head here.

Not all without one are here: some generate otherwise than token by token, scale what their head
gives, or see pictures with other weights, so that a head alone would not make them right.
"""

_NAMED_AS_IN_WHOLE = frozenset({"minimax_m3_vl_text"})
"""Model types with a head of their own whose tensors have other names in files of the whole."""

_SUFFIX = "_text"
_LAYERS: Any = MODEL_MAPPING  # typed as if its classes might come in pairs


class _WithHead:
    """What a class with a head adds to transformers' class of the layers' kind."""

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        this = cast(Any, self)
        this.model = _LAYERS[type(config)](config)
        this.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        this.post_init()

    def forward(self, logits_to_keep: int | Tensor = 0, **inputs: Any) -> CausalLMOutputWithPast:
        """Return logits [1, tokens kept, vocab_size]; see transformers' own classes.

        Args:
            logits_to_keep: the rows, or how many of the last ones; 0 is all.
            inputs: of the layers.
        """
        this = cast(Any, self)
        states = this.model(**inputs).last_hidden_state
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=this.lm_head(states[:, rows, :]))


@functools.cache
def class_with_head(kind: Any) -> type[PreTrainedModel]:
    """Return a class for text models, one of `WITHOUT_HEAD`.

    Args:
        kind: transformers' class of their configuration.
    """
    layers = _LAYERS[kind]
    parent = next(base for base in layers.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = f"{layers.__name__}WithHead"
    return type(name, (_WithHead, parent), {"config_class": kind, "__module__": __name__})


def conversions_of(model: PreTrainedModel) -> Sequence[Any]:
    """Return transformers' conversions from the tensors of files to those of a model.

    Of a text model that has got its head here, they are those of the model that it is a part of;
    of some others, these too.
    """
    own = cast(Sequence[Any], get_model_conversion_mapping(model))
    model_type = str(model.config.model_type)
    if model_type not in WITHOUT_HEAD | _NAMED_AS_IN_WHOLE:
        return own
    mapping: Any = get_checkpoint_conversion_mapping
    of_whole = mapping(model_type.removesuffix(_SUFFIX)) or []
    if model_type in _NAMED_AS_IN_WHOLE:
        return [*of_whole, *own]
    return [*(one for one in of_whole if isinstance(one, WeightConverter)), *own]
