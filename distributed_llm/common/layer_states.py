"""Which layers of a model keep keys and values, which a state of their own, and how large it is.

A layer that is no softmax attention keeps a state of a sequence, which does not grow: the last
columns that went into its convolution (the *window*), and what its recurrence has summed up. A
layer may keep both keys and values and a state, or nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distributed_llm.common.encoder_decoders import (
    decoder_layers,
    encoder_layers,
    is_encoder_decoder,
)
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.layer_types import layer_types
from distributed_llm.common.model_sizes import hidden_size, num_layers, positive
from distributed_llm.common.ngrams import ngram_windows
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName

Config = Mapping[str, Any]

HELD_STATES = 2
"""States that a stage keeps of a sequence, beside snapshots: the latest, and the one before."""

_LARGEST_PART = 1024
"""Far more times the hidden size than any width is."""

_RECURRENT_BYTES = ITEM_BYTES["float32"]
"""Of a number of a recurrence; it sums up the whole text, so it is kept in float32."""

_KINDS = {
    **dict.fromkeys(("linear_attention", "mamba", "conv"), "state"),
    **dict.fromkeys(("moe", "mlp"), "nothing"),
    **dict.fromkeys(("hybrid", "hybrid_sliding"), "both"),
}
"""What layers of these types keep, by the types' names in config.json; all others: positions."""


class MixerSizes(NamedTuple):
    """What a layer with a state of its own consists of.

    Attributes:
        window: numbers of its window.
        heads: of its recurrence; 0 if it has none.
        key_dim: numbers of a head that its state is written and read by.
        value_dim: numbers of a head that are written and read.
    """

    window: int
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    @property
    def recurrent(self) -> int:
        """Numbers that the recurrence has summed up."""
        return self.heads * self.key_dim * self.value_dim


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
    kinds, mixer = _kinds(config), mixer_sizes(config)
    if mixer is None:
        return (0,) * len(kinds)
    item_bytes = ITEM_BYTES[dtype]
    of_recurrence = item_bytes if config["model_type"] in _RECURRENT_IN_DTYPE else _RECURRENT_BYTES
    nbytes = mixer.window * item_bytes + mixer.recurrent * of_recurrence
    of_mixers = (nbytes * (kind in ("state", "both")) for kind in kinds)
    windows = ngram_windows(config, len(kinds))
    return tuple(own + window * item_bytes for own, window in zip(of_mixers, windows, strict=True))


def mixer_sizes(config: Config) -> MixerSizes | None:
    """Return what the layers with a state consist of; None if there are none.

    Raises:
        CheckpointError: a size is not there, or no possible number.
    """
    if not {"state", "both"}.intersection(_kinds(config)):
        return None
    return _SIZES_OF[str(config["model_type"])](config)


def _kinds(config: Config) -> tuple[str, ...]:
    """Return what each layer keeps: "positions", "state", "both" or "nothing"."""
    if is_encoder_decoder(config):
        return ("nothing",) * encoder_layers(config) + ("positions",) * decoder_layers(config)
    count = num_layers(config)
    if config.get("model_type") not in _SIZES_OF:
        return ("positions",) * count
    return tuple(_KINDS.get(kind, "positions") for kind in layer_types(config, count))


def _delta_net(config: Config) -> MixerSizes:
    key_heads = _size(config, "linear_num_key_heads", "num_attention_heads")
    value_heads = _size(config, "linear_num_value_heads", "num_attention_heads")
    key_dim = _told(config, "linear_key_head_dim") or int(0.75 * hidden_size(config) / key_heads)
    value_dim = _told(config, "linear_value_head_dim") or 2 * key_dim
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    width = _told(config, "linear_conv_kernel_dim") or 4
    return MixerSizes(channels * width, value_heads, key_dim, value_dim)


def _kimi_delta(config: Config) -> MixerSizes:
    told = _linear_attention(config)
    heads = _told(told, "num_heads") or _size(config, "linear_num_heads")
    dim = _told(told, "head_dim") or _size(config, "linear_head_dim")
    width = _told(told, "short_conv_kernel_size") or _told(config, "linear_conv_kernel_dim") or 4
    return MixerSizes(3 * heads * dim * width, heads, dim, dim)


def _bailing_delta(config: Config) -> MixerSizes:
    heads, dim = _size(config, "num_attention_heads"), _told(config, "head_dim") or 128
    width = _told(config, "short_conv_kernel_size") or 4
    return MixerSizes(3 * heads * dim * width, heads, dim, dim)


def _linear_attention(config: Config) -> Mapping[str, Any]:
    told = config.get("linear_attn_config")
    return told if isinstance(told, Mapping) else {}


def _short_convolution(config: Config) -> MixerSizes:
    return MixerSizes(hidden_size(config) * _size(config, "conv_L_cache"))


def _mamba2(config: Config) -> MixerSizes:
    heads = _size(config, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    state = _size(config, "mamba_d_state", "ssm_state_size", "state_size")
    groups = _size(config, "mamba_n_groups", "mamba_ngroups", "n_groups")
    width = _size(config, "mamba_d_conv", "conv_kernel")
    dim = _told(config, "mamba_head_dim") if "mamba_num_heads" in config else None
    channels = heads * dim if dim else _told(config, "mamba_d_ssm") or _expanded(config)
    return MixerSizes((channels + 2 * groups * state) * width, heads, state, channels // heads)


def _mamba(config: Config) -> MixerSizes:
    own_width = "state_size" in config  # Jamba's intermediate_size is that of its MLPs
    channels = (_told(config, "intermediate_size") if own_width else None) or _expanded(config)
    width = _size(config, "mamba_d_conv", "conv_kernel")
    state = _size(config, "mamba_d_state", "state_size")
    return MixerSizes(channels * width, channels, state, 1)


def _expanded(config: Config) -> int:
    expansion = _told(config, "mamba_expand") or _told(config, "expand") or 2
    return expansion * hidden_size(config)


def _lightning(config: Config) -> MixerSizes:
    heads = _size(config, "num_attention_heads")
    dim = _told(config, "head_dim") or hidden_size(config) // heads
    return MixerSizes(0, heads, dim, dim)


def _griffin(config: Config) -> MixerSizes:
    width = _told(config, "lru_width") or hidden_size(config)
    return MixerSizes(width * ((_told(config, "conv1d_width") or 4) - 1), width, 1, 1)


def _rwkv(config: Config) -> MixerSizes:
    width = _told(config, "attention_hidden_size") or hidden_size(config)
    return MixerSizes(2 * hidden_size(config), width, 3, 1)


def _zaya(config: Config) -> MixerSizes:
    heads, kv_heads = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    dim, widths = _told(config, "head_dim") or 128, 0
    for name in ("cca_time0", "cca_time1"):
        widths += (_told(config, name) or 2) - 1
    return MixerSizes((heads + kv_heads) * dim * widths + kv_heads * dim // 2)


def _xlstm(config: Config) -> MixerSizes:
    heads = positive({"num_heads": 8, **config}, "num_heads")
    keys, values = (width // heads for width in xlstm_widths(config))
    return MixerSizes(0, heads, keys * (values + 1) + 1, 1)


def xlstm_widths(config: Config) -> tuple[int, int]:
    """Return the numbers of all keys of a token in a layer of xLSTM, and of all values.

    Raises:
        CheckpointError: they are no possible numbers.
    """
    return _part(config, "qk_dim_factor", 0.5), _part(config, "v_dim_factor", 1.0)


def _part(config: Config, name: str, default: float) -> int:
    """Return a width that config.json tells as a part of the hidden size.

    Raises:
        CheckpointError: it is no possible part.
    """
    told = config.get(name, default)
    if type(told) not in (int, float) or not 0 < told <= _LARGEST_PART:
        raise CheckpointError(
            f"config.json has {name} = {told!r}; it must be a number above 0. Copy that of the "
            "original model."
        )
    return int(hidden_size(config) * told)


def _told(config: Config, name: str) -> int | None:
    """Return a size that config.json need not have, None if it has not."""
    return None if config.get(name) is None else positive(config, name)


def _size(config: Config, *names: str) -> int:
    return positive(config, *names)


DELTA_NETS = frozenset(
    {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid"}
)
"""Model types whose state fades by a number per head."""

MAMBA = frozenset({"jamba", "mamba", "falcon_mamba", "zamba"})
"""Model types whose state fades by a number per channel and place."""

MAMBA2 = frozenset({"bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "mamba2", "zamba2"})
"""Model types whose state fades by a number per head, with a window of all channels."""

_SIZES_OF: Mapping[str, Callable[[Config], MixerSizes]] = {
    **dict.fromkeys(DELTA_NETS, _delta_net),
    "kimi_linear": _kimi_delta,
    "bailing_hybrid": _bailing_delta,
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _short_convolution),
    **dict.fromkeys(MAMBA2, _mamba2),
    **dict.fromkeys(MAMBA, _mamba),
    "minimax": _lightning,
    "recurrent_gemma": _griffin,
    "rwkv": _rwkv,
    "xlstm": _xlstm,
    "zaya": _zaya,
}

_RECURRENT_IN_DTYPE = frozenset({"minimax"})
"""Model types whose recurrence is kept in the dtype that the model computes in."""
