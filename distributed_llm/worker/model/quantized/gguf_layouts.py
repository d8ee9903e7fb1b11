"""How GGUF files hold what transformers' own tables of them do not know.

llama.cpp's converter cuts some parameters in two, and gives some tensors other numbers. What is
here says so by names: those of a model of transformers, and those in the files.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distributed_llm.worker.model.quantized.targets import Join, Target

KNOWN_AS: Mapping[str, str] = {"gptoss": "gpt-oss", "qwen25vl": "qwen2vl"}
"""Architectures that ollama's own files call otherwise than llama.cpp."""

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "gptoss": {"attn_out": "attn_output", "ffn_norm": "post_attention_norm"},
}
"""By architecture, what files call otherwise than llama.cpp does."""

_IN_LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r".*experts\.gate_up_proj",
        ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight"),
    ),
    (
        r".*experts\.gate_up_proj_bias",
        ("ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_gate_up_exps.bias"),
    ),
    (r".*experts\.down_proj", ("ffn_down_exps.weight",)),
    (r".*experts\.down_proj_bias", ("ffn_down_exps.bias",)),
    (r".*e_score_correction_bias|feed_forward\.expert_bias", ("exp_probs_b.bias",)),
    (r"block_sparse_moe\.router\.weight", ("ffn_gate_inp.weight",)),
    (
        r"shared_mlp\.input_linear\.weight",
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_gate.weight", "ffn_up.weight"),
    ),
    (r"shared_mlp\.output_linear\.weight", ("ffn_down_shexp.weight", "ffn_down.weight")),
    (r"self_attn\.sinks", ("attn_sinks.weight", "attn_sinks")),
    (r"self_attn\.kv_b_proj\.weight", ("attn_k_b.weight", "attn_v_b.weight")),
    (r"self_attn\.[qkv]_proj\.weight", ("attn_qkv.weight",)),
    (r"self_attn\.[qkv]_proj\.bias", ("attn_qkv.bias",)),
    (r"linear_attn\.in_proj_qkvz\.weight", ("attn_qkv.weight", "attn_gate.weight")),
    (r"(linear_attn|mixer|mamba)\.dt_bias", ("ssm_dt.bias",)),
    (r"layer_scalar", ("layer_output_scale.weight",)),
    (r"router\.scale", ("ffn_gate_inp.scale",)),
    (r"router\.per_expert_scale", ("ffn_down_exps.scale",)),
    (r"altup\.correct_output_scale", ("altup_correct_scale.weight",)),
)
"""Parameters of layers, and the tensors in files that are the whole or a part of them; a tensor may
be several of them."""

_OF_MIXERS: Mapping[str, str] = {
    **{"A_log": "ssm_a", "D": "ssm_d", "conv1d.weight": "ssm_conv1d.weight"},
    **{"conv1d.bias": "ssm_conv1d.bias", "in_proj.weight": "ssm_in.weight"},
    **{"norm.weight": "ssm_norm.weight", "out_proj.weight": "ssm_out.weight"},
    **{"q_proj.weight": "attn_q.weight", "k_proj.weight": "attn_k.weight"},
    **{"v_proj.weight": "attn_v.weight", "o_proj.weight": "attn_output.weight"},
    **{"up_proj.weight": "ffn_up.weight", "down_proj.weight": "ffn_down.weight"},
    **{"experts.up_proj": "ffn_up_exps.weight", "gate.weight": "ffn_gate_inp.weight"},
    **{"shared_experts.up_proj.weight": "ffn_up_shexp.weight"},
    **{"shared_experts.down_proj.weight": "ffn_down_shexp.weight"},
    **{"fc1_latent_proj.weight": "ffn_latent_down.weight"},
    **{"fc2_latent_proj.weight": "ffn_latent_up.weight"},
}
"""Parameters of Nemotron H, all of whose layers have one part of that name, and their tensors."""

_OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"model\.altup_projections\.\d+\.weight", "altup_proj.weight"),
    (r"model\.altup_unembed_projections\.\d+\.weight", "altup_unembd_proj.weight"),
)
"""Likewise, of parameters outside the layers."""

_LAYER = re.compile(r"(?:.+\.)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")

_PIECES: Mapping[str, tuple[int, Join]] = {
    "ffn_gate_exps": (0, "rows"),
    "ffn_up_exps": (1, "rows"),
    "ffn_gate_shexp": (0, "rows"),
    "ffn_up_shexp": (1, "rows"),
    "ffn_gate": (0, "rows"),
    "ffn_up": (1, "rows"),
    "attn_k_b": (0, "stacks"),
    "attn_v_b": (1, "stacks"),
    "attn_qkv": (0, "stacks"),
    "attn_gate": (1, "stacks"),
}
"""Which of two pieces a tensor is, and how they make the parameter."""

_IN_PIECES = re.compile(r"\.(gate_up_proj(_bias)?|(input_linear|kv_b_proj|in_proj_qkvz)\.weight)$")
"""How parameters end that may be in two pieces."""

_TAKING_TURNS = frozenset({"gpt-oss", "gptoss"})
"""Architectures whose rows of gates and ups take turns in a model of transformers."""


def stack_of(parameter: str, config: Mapping[str, Any]) -> int:
    """Return of how many matrices the rows of a piece are, which are joined one by one; 0: of one.

    Args:
        parameter: that the piece belongs to.
        config: content of config.json.
    """
    joined_by_head = parameter.endswith(".in_proj_qkvz.weight")
    return int(config["linear_num_key_heads"]) if joined_by_head else 0


def usual_name(name: str, architecture: str) -> str:
    """Return what llama.cpp calls a tensor of files of this architecture."""
    stem, dot, end = name.rpartition(".")
    path, _, leaf = stem.rpartition(".")
    renamed = _RENAMED.get(architecture, {}).get(leaf)
    return name if renamed is None else f"{path}.{renamed}{dot}{end}"


def more_names(parameter: str) -> list[str]:
    """Return the tensors in files that are a parameter or a part of it, beyond those of `gguf`."""
    if (match := _LAYER.fullmatch(parameter)) is None:
        return [name for pattern, name in _OUTSIDE if re.fullmatch(pattern, parameter)]
    path, _, rest = match["rest"].partition(".")
    if path == "mixer" and rest in _OF_MIXERS:
        return [f"blk.{match['layer']}.{_OF_MIXERS[rest]}"]
    return [
        f"blk.{match['layer']}.{leaf}"
        for pattern, leaves in _IN_LAYERS
        if re.fullmatch(pattern, match["rest"])
        for leaf in leaves
    ]


def parts_of(
    parameters: Sequence[str], shapes: Sequence[tuple[int, ...]], rank: int
) -> tuple[Target, ...]:
    """Return what becomes of a tensor that is several parameters.

    Args:
        parameters: in the order in which they are in the tensor.
        shapes: of the parameters.
        rank: dimensions of the tensor: one more than theirs if it is a stack of them; otherwise
            their rows follow each other.
    """
    if rank > len(shapes[0]):
        return tuple(
            Target(name, convert=functools.partial(torch.select, dim=0, index=number))
            for number, name in enumerate(parameters)
        )
    stops = list(itertools.accumulate(shape[0] for shape in shapes))
    return tuple(
        Target(name, rows=torch.arange(stop - shape[0], stop))
        for name, shape, stop in zip(parameters, shapes, stops, strict=True)
    )


def piece_of(leaf: str, parameter: str, architecture: str) -> tuple[int, Join] | None:
    """Return which of two pieces a tensor is, and how they are joined; None: it is the whole.

    Args:
        leaf: name of the tensor, without that of its layer.
        parameter: that it becomes, or a part of it.
        architecture: by llama.cpp's name.
    """
    piece = _PIECES.get(leaf.partition(".")[0])
    if piece is None or not _IN_PIECES.search(parameter):
        return None
    turns = leaf.startswith("ffn_") and architecture in _TAKING_TURNS
    return (piece[0], "turns") if turns else piece
