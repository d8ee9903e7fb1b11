"""Which layers of a model keep keys and values, which a state of their own, and how large it is.

A layer that is no softmax attention keeps a state of a sequence, which does not grow: the last
columns that went into its convolution (the *window*), and what its recurrence has summed up. A
layer may keep both keys and values and a state, or nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distributed_llm.common.layer_types import layer_types
from distributed_llm.common.model_sizes import hidden_size, num_layers, positive
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName

Config = Mapping[str, Any]

HELD_STATES = 2
"""States that a stage keeps of a sequence, beside snapshots: the latest, and the one before."""

_RECURRENT_BYTES = ITEM_BYTES["float32"]
"""Of a number of a recurrence; it sums up the whole text, so it is kept in float32."""

_KINDS = {
    **dict.fromkeys(("linear_attention", "mamba", "conv", "recurrent"), "state"),
    **dict.fromkeys(("moe", "mlp"), "nothing"),
    **dict.fromkeys(("hybrid", "hybrid_sliding"), "both"),
}
"""What layers of these types keep, by the types' names in config.json; all others: positions."""


class _Numbers(NamedTuple):
    """Numbers of one layer's state."""

    window: int
    recurrent: int


def keeps_kv(config: Config) -> tuple[bool, ...]:
    """Return whether each layer keeps keys and values of every position.

    Args:
        config: the content of config.json.
    """
    return tuple(kind in ("positions", "both") for kind in _kinds(config))


def state_bytes(config: Config, dtype: DtypeName) -> tuple[int, ...]:
    """Return the bytes of the state of one sequence in each layer; 0: it keeps none.

    Args:
        config: the content of config.json.
        dtype: that the model computes in.

    Raises:
        CheckpointError: a size is not there, or no possible number.
    """
    kinds = _kinds(config)
    if not {"state", "both"}.intersection(kinds):
        return (0,) * len(kinds)
    numbers = _SIZES_OF[str(config["model_type"])](config)
    item_bytes = ITEM_BYTES[dtype]
    of_recurrence = item_bytes if config["model_type"] in _RECURRENT_IN_DTYPE else _RECURRENT_BYTES
    nbytes = numbers.window * item_bytes + numbers.recurrent * of_recurrence
    return tuple(nbytes * (kind in ("state", "both")) for kind in kinds)


def _kinds(config: Config) -> tuple[str, ...]:
    """Return what each layer keeps: "positions", "state", "both" or "nothing"."""
    count = num_layers(config)
    if config.get("model_type") not in _SIZES_OF:
        return ("positions",) * count
    return tuple(_KINDS.get(kind, "positions") for kind in layer_types(config, count))


def _delta_net(config: Config) -> _Numbers:
    key_heads = _size(config, "linear_num_key_heads", "num_attention_heads")
    value_heads = _size(config, "linear_num_value_heads", "num_attention_heads")
    key_dim = config.get("linear_key_head_dim") or int(0.75 * hidden_size(config) / key_heads)
    value_dim = config.get("linear_value_head_dim") or 2 * key_dim
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    width = config.get("linear_conv_kernel_dim") or 4
    return _Numbers(channels * width, value_heads * key_dim * value_dim)


def _kimi_delta(config: Config) -> _Numbers:
    told = _linear_attention(config)
    heads = told.get("num_heads") or _size(config, "linear_num_heads")
    dim = told.get("head_dim") or _size(config, "linear_head_dim")
    width = told.get("short_conv_kernel_size") or config.get("linear_conv_kernel_dim") or 4
    return _Numbers(3 * heads * dim * width, heads * dim * dim)


def _linear_attention(config: Config) -> Mapping[str, Any]:
    told = config.get("linear_attn_config")
    return told if isinstance(told, Mapping) else {}


def _short_convolution(config: Config) -> _Numbers:
    return _Numbers(hidden_size(config) * _size(config, "conv_L_cache"), 0)


def _mamba2(config: Config) -> _Numbers:
    heads = _size(config, "mamba_n_heads", "mamba_num_heads", "num_heads")
    state = _size(config, "mamba_d_state", "ssm_state_size", "state_size")
    groups = _size(config, "mamba_n_groups", "n_groups")
    width = _size(config, "mamba_d_conv", "conv_kernel")
    dim = config.get("mamba_head_dim") if "mamba_num_heads" in config else None
    channels = heads * dim if dim else config.get("mamba_d_ssm") or _expanded(config)
    return _Numbers((channels + 2 * groups * state) * width, channels * state)


def _mamba(config: Config) -> _Numbers:
    own_width = "state_size" in config  # Jamba's intermediate_size is that of its MLPs
    channels = (config.get("intermediate_size") if own_width else None) or _expanded(config)
    width = _size(config, "mamba_d_conv", "conv_kernel")
    state = _size(config, "mamba_d_state", "state_size")
    return _Numbers(channels * width, channels * state)


def _expanded(config: Config) -> int:
    return int((config.get("mamba_expand") or config.get("expand") or 2) * hidden_size(config))


def _lightning(config: Config) -> _Numbers:
    heads = _size(config, "num_attention_heads")
    dim = config.get("head_dim") or hidden_size(config) // heads
    return _Numbers(0, heads * dim * dim)


def _lru(config: Config) -> _Numbers:
    width = _size(config, "lru_width", "hidden_size")
    return _Numbers(hidden_size(config) * (_size(config, "conv1d_width") - 1), width)


def _size(config: Config, *names: str) -> int:
    return positive(config, *names)


_SIZES_OF: Mapping[str, Callable[[Config], _Numbers]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _delta_net),
    "kimi_linear": _kimi_delta,
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _short_convolution),
    **dict.fromkeys(("bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "mamba2"), _mamba2),
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), _mamba),
    "minimax": _lightning,
    "recurrent_gemma": _lru,
}

_RECURRENT_IN_DTYPE = frozenset({"minimax"})
"""Model types whose recurrence is kept in the dtype that the model computes in."""
