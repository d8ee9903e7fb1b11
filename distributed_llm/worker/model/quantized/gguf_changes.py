"""What llama.cpp's converter does to the numbers of tensors, undone, by architecture.

Only what transformers' own reader does not undo.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]
Config = Mapping[str, Any]
_Change = Callable[[Numbers, str, Config], Numbers]


def _of_deepseek(numbers: Numbers, name: str, config: Config) -> Numbers:
    """Keys' part of `kv_b_proj` lies the other way round, to be multiplied by queries."""
    return numbers.swapaxes(-1, -2) if ".attn_k_b." in name else numbers


def _of_ernie(numbers: Numbers, name: str, config: Config) -> Numbers:
    return numbers[None] if name.endswith("exp_probs_b.bias") else numbers


def _of_delta_net(numbers: Numbers, name: str, config: Config) -> Numbers:
    """Return the numbers of layers of Qwen 3 Next, and of Qwen 3.5 but for the order of heads."""
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return numbers - 1
    if name.endswith(".ssm_a"):
        return np.log(-numbers)
    if ".ssm_conv1d." in name:
        return numbers[:, None]
    if ".ffn_gate_inp_shexp." in name and numbers.ndim == 1:
        return numbers[None]
    return numbers


def _of_qwen3_next(numbers: Numbers, name: str, config: Config) -> Numbers:
    """Queries, keys and values of a head follow each other in the model."""
    if ".attn_qkv." not in name:
        return _of_delta_net(numbers, name, config)
    heads = config["linear_num_key_heads"]
    keys = config["linear_key_head_dim"] * heads
    parts = np.split(numbers, [keys, 2 * keys])
    by_head = [part.reshape(heads, -1, *numbers.shape[1:]) for part in parts]
    return np.concatenate(by_head, axis=1).reshape(numbers.shape)


def _of_qwen35(numbers: Numbers, name: str, config: Config) -> Numbers:
    """Value heads of one key head follow each other in the model, and are far apart in files."""
    leaf = name.split(".")[2] if name.startswith("blk.") else ""
    width = config["linear_value_head_dim"]
    if leaf == "ssm_out":
        return _grouped(numbers.T, config, width).T
    if leaf in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta"):
        numbers = _grouped(numbers, config, 1)
    elif leaf == "attn_gate":
        numbers = _grouped(numbers, config, width)
    elif leaf in ("attn_qkv", "ssm_conv1d"):
        first = 2 * config["linear_key_head_dim"] * config["linear_num_key_heads"]
        values = _grouped(numbers[first:], config, width)
        numbers = np.concatenate([numbers[:first], values])
    return _of_delta_net(numbers, name, config)


def _of_mamba2(numbers: Numbers, name: str, config: Config) -> Numbers:
    if name.endswith(".ssm_a"):
        return np.log(-numbers).reshape(-1)
    if name.endswith((".ssm_d", ".ssm_norm.weight")):
        return numbers.reshape(-1)
    return numbers[:, None] if name.endswith(".ssm_conv1d.weight") else numbers


def _of_granite_hybrid(numbers: Numbers, name: str, config: Config) -> Numbers:
    """Queries and keys of a head have what is rotated together side by side in files."""
    for leaf, heads in ((".attn_q.", "num_attention_heads"), (".attn_k.", "num_key_value_heads")):
        if leaf in name:
            pairs = numbers.reshape(config[heads], -1, 2, *numbers.shape[1:])
            return pairs.swapaxes(1, 2).reshape(numbers.shape)
    return _of_mamba2(numbers, name, config)


def _grouped(numbers: Numbers, config: Config, width: int) -> Numbers:
    """Return rows, `width` for each value head, with those of a key head side by side."""
    keys = config["linear_num_key_heads"]
    tiled = numbers.reshape(-1, keys, width, *numbers.shape[1:])
    return tiled.swapaxes(0, 1).reshape(numbers.shape)


CHANGES: Mapping[str, _Change] = {
    "deepseek2": _of_deepseek,
    "ernie4_5-moe": _of_ernie,
    "granitehybrid": _of_granite_hybrid,
    **dict.fromkeys(("mamba2", "nemotron_h", "nemotron_h_moe"), _of_mamba2),
    "qwen3next": _of_qwen3_next,
    "qwen35": _of_qwen35,
    "qwen35moe": _of_qwen35,
}
"""Functions of a tensor's numbers, its name and config.json, by llama.cpp's names."""
