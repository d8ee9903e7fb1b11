"""Makes the configuration of a small model of the same structure as a large one.

It has layers of every kind, and its windows, chunks and original context are shorter than the texts
that a small model is tried with (`LONG_TEXT`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from distributed_llm.worker.model.empty_model import model_config

LONG_TEXT = 24
"""Tokens of a text that is longer than all that limits how far a token of a small model sees."""

_SHORT = 6
_VOCABULARY = 128
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "vocab_size": _VOCABULARY,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
"""Sizes of the small model, by transformers' names; those that its configuration has are set."""

_AT_MOST = {
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "attention_chunk_size": _SHORT,
    "local_attention": _SHORT,
    "original_max_position_embeddings": _SHORT,
}
_MAX_LAYERS = 6


def shrink_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json for a small model of the same structure."""
    made = model_config(config)
    names = made.attribute_map
    small: dict[str, Any] = _limited(made.to_dict())
    old_layers = int(small[names.get("num_hidden_layers", "num_hidden_layers")])
    lists = {n: v for n, v in small.items() if isinstance(v, list) and len(v) == old_layers}
    layers = _layers_to_keep(lists)
    small |= {name: value[:layers] for name, value in lists.items()}
    sizes = {**_SIZES, "num_hidden_layers": layers}
    if "qk_rope_head_dim" in small:
        del sizes["head_dim"]  # latent attention derives it from other sizes
    if kv_heads := small.get("num_key_value_heads"):
        heads = config.get(names.get("num_attention_heads", "num_attention_heads"), 1)
        every_head = kv_heads == heads or "kv_lora_rank" in small
        sizes["num_key_value_heads"] = 4 if every_head else 2
    for name, size in sizes.items():
        own_name = names.get(name, name)
        if type(small.get(own_name)) is int:
            small[own_name] = size
    _shorten_factors(small)
    return small


def _shorten_factors(small: Mapping[str, Any]) -> None:
    """Give the factors of longrope the length that they have in smaller heads."""
    rope = small.get("rope_parameters")
    if rope and "long_factor" in rope:
        dim = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
        rotated = int(dim * rope.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            rope[name] = rope[name][:rotated]


def _limited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, or a part of one, with positions and token ids made small."""
    return {name: _limit(str(name), value) for name, value in values.items()}


def _limit(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _limited(value)
    if name.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        small = [one % _VOCABULARY if isinstance(one, int) else one for one in ids]
        return small if isinstance(value, list) else small[0]
    if type(value) is not int:
        return value
    is_window = "window" in name and not name.endswith(("layers", "pattern"))
    return min(value, _SHORT if is_window else _AT_MOST.get(name, value))


def _layers_to_keep(lists: Mapping[str, list[Any]]) -> int:
    """Return how many leading layers contain every kind of layer; between 2 and `_MAX_LAYERS`.

    Args:
        lists: what the configuration tells of each layer, by name.
    """
    shown = (1 + max(_first_of_each(values)) for values in lists.values())
    return min(max(2, *shown), _MAX_LAYERS) if lists else 2


def _first_of_each(values: list[Any]) -> Iterator[int]:
    seen: list[Any] = []
    for number, value in enumerate(values):
        if value not in seen:
            seen.append(value)
            yield number
