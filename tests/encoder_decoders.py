"""Tiny random encoder-decoders of every type that is served, made in place; nothing is downloaded.

What each stack has differs (layers, widths of MLPs), so that no part can be taken for another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PreTrainedModel

VOCAB_SIZE = 128
WEIGHT_STD = 0.4
EMBEDDING_STD = 0.1
"""Small, for a head that is tied to the embedding would repeat the latest token for ever."""
ENCODER_LAYERS = 3
DECODER_LAYERS = 2
START = 3
"""The token that decoders start with."""
PAD = 1

_OF_T5: Mapping[str, Any] = {
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": ENCODER_LAYERS,
    "num_decoder_layers": DECODER_LAYERS,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
_OF_BART: Mapping[str, Any] = {
    "d_model": 32,
    "encoder_layers": ENCODER_LAYERS,
    "decoder_layers": DECODER_LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
}
_OF_GEMMA: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "vocab_size": VOCAB_SIZE,
    "sliding_window": 5,
}

_OF_GEMMA_2: Mapping[str, Any] = {
    **_OF_GEMMA,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "bos_token_id": START,
    "pad_token_id": PAD,
    "eos_token_id": 2,
}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "t5": _OF_T5,
    "mt5": {**_OF_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {**_OF_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "switch_transformers": {
        **_OF_T5,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 2,
        "expert_capacity": 8,
    },
    "bart": {**_OF_BART, "forced_eos_token_id": None},
    "mbart": {**_OF_BART, "scale_embedding": True, "forced_eos_token_id": None},
    "mvp": {**_OF_BART, "forced_eos_token_id": None},
    "plbart": {**_OF_BART, "forced_eos_token_id": None},
    "pegasus": {**_OF_BART, "scale_embedding": True, "forced_eos_token_id": None},
    "marian": {**_OF_BART, "scale_embedding": True, "forced_eos_token_id": None},
    "m2m_100": {**_OF_BART, "scale_embedding": True},
    "blenderbot": {**_OF_BART, "forced_eos_token_id": None},
    "blenderbot-small": {**_OF_BART, "forced_eos_token_id": None},
    "t5gemma": {
        "encoder": {**_OF_GEMMA, "num_hidden_layers": ENCODER_LAYERS, "hidden_size": 40},
        "decoder": {**_OF_GEMMA, "num_hidden_layers": DECODER_LAYERS, "intermediate_size": 40},
    },
    "t5gemma2": {
        "encoder": {
            "text_config": {**_OF_GEMMA_2, "num_hidden_layers": ENCODER_LAYERS},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 14,
            },
            "mm_tokens_per_image": 1,
            "eoi_token_index": 9,
            "image_token_index": 10,
        },
        "decoder": {**_OF_GEMMA_2, "num_hidden_layers": DECODER_LAYERS, "intermediate_size": 40},
        "image_token_index": 10,
    },
}


def config_of(model_type: str, **settings: Any) -> Any:
    """Return the configuration of a small encoder-decoder, of transformers' class for it."""
    tokens = {
        "vocab_size": VOCAB_SIZE,
        "decoder_start_token_id": START,
        "pad_token_id": PAD,
        "eos_token_id": 2,
        "bos_token_id": 0,
    }
    return CONFIG_MAPPING[model_type](**{**tokens, **SETTINGS[model_type], **settings})


def build(model_type: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a random encoder-decoder, in float32."""
    config = config_of(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        of_kind: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
        model: PreTrainedModel = of_kind(config)
        for name, parameter in model.named_parameters():
            if "embed_positions" in name and not parameter.requires_grad:
                continue  # sines and cosines
            if parameter.dim() > 1:
                embeds = "shared" in name or "embed_tokens" in name
                torch.nn.init.normal_(parameter, std=EMBEDDING_STD if embeds else WEIGHT_STD)
            else:
                parameter.data += WEIGHT_STD * torch.randn_like(parameter)
        if isinstance(bias := getattr(model, "final_logits_bias", None), torch.Tensor):
            bias += EMBEDDING_STD * torch.randn_like(bias)
    model.train(False)
    return model


def make(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a checkpoint of a random encoder-decoder, and return its folder."""
    build(model_type, **settings).save_pretrained(folder)
    return folder


def answered(
    model: Any,
    source: Sequence[int],
    new_tokens: int,
    start: Sequence[int] = (START,),
    forced_bos_token_id: int | None = None,
) -> list[int]:
    """Return the greedy answer of a model of transformers, without its start tokens."""
    made = model.generate(
        torch.tensor([list(source)]),
        attention_mask=torch.ones((1, len(source)), dtype=torch.int64),
        decoder_input_ids=torch.tensor([list(start)]),
        decoder_start_token_id=start[0],
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        forced_bos_token_id=forced_bos_token_id,
        forced_eos_token_id=None,
    )
    answer: list[int] = made[0, len(start) :].tolist()
    return answer


def numbers(count: int, seed: int) -> tuple[int, ...]:
    """Return token ids that are no padding, start or end."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist())
