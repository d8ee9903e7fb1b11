"""The rotary positions of a model in GGUF files, as config.json has them.

llama.cpp's converter keeps scaled frequencies in tensors, which transformers' reader ignores.
"""

import math
from typing import Any

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.gguf_texts.header import Header

_DEFAULT_BASE = 10_000.0
_LOW, _HIGH = 1.0, 4.0
_LLAMA3_CONTEXTS = (8192, 4096, 16384, 32768)
"""Lengths that models with Llama 3's scaling were first trained with."""

_TOLERANCE = 1e-4
_UNSAID = {"gptoss": "yarn"}
"""How architectures scale whose files say only by how much."""


def rope_parameters(header: Header, head_dim: int) -> dict[str, Any]:
    """Return `rope_parameters` of a model whose layers all have the same.

    Args:
        head_dim: width of a head.

    Raises:
        UnsupportedModel: the scaling is of a kind that is not known.
    """
    base = float(header.get("rope.freq_base") or _DEFAULT_BASE)
    rotated = int(header.get("rope.dimension_count") or head_dim)
    common: dict[str, Any] = {"rope_theta": base}
    if rotated < head_dim:
        common["partial_rotary_factor"] = rotated / head_dim
    return common | _scaling(header, base, rotated)


def linear_factor(header: Header) -> float | None:
    """Return the factor of linear scaling, or None if there is none."""
    if header.get("rope.scaling.type") != "linear":
        return None
    factor = header.get("rope.scaling.factor")
    return float(factor) if factor else None


def _scaling(header: Header, base: float, rotated: int) -> dict[str, Any]:
    if (factors := _tensor(header, "rope_freqs.weight")) is not None:
        return _by_factors(header, factors, base, rotated)
    if (long := _tensor(header, "rope_factors_long.weight")) is not None:
        return _longrope(header, long, _tensor(header, "rope_factors_short.weight") or long)
    kind = header.get("rope.scaling.type") or _UNSAID.get(header.architecture, "none")
    if kind in ("none", "longrope"):  # longrope without factors: of a short context
        return {"rope_type": "default"}
    factor = float(header.get("rope.scaling.factor") or 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = header.get("rope.scaling.original_context_length")
        length = original or round(header.get("context_length") / factor)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(length),
        }
    raise UnsupportedModel(
        f"scales rotary positions in a way that is not known ({kind!r}). Use a folder with the "
        "original model."
    )


def _tensor(header: Header, name: str) -> list[float] | None:
    return header.numbers(name) or header.numbers(f"blk.0.{name}")


def _by_factors(header: Header, factors: list[float], base: float, rotated: int) -> dict[str, Any]:
    """Return the scaling by which each frequency is divided by a factor of its own."""
    if all(abs(factor - 1) < _TOLERANCE for factor in factors):
        return {"rope_type": "default"}
    for context in _LLAMA3_CONTEXTS:
        known = _llama3_factors(max(factors), context, base, rotated)
        if len(known) == len(factors) and all(
            math.isclose(*pair, rel_tol=_TOLERANCE) for pair in zip(known, factors, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": max(factors),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }
    return _longrope(header, factors, factors) | {"attention_factor": 1.0}


def _llama3_factors(factor: float, context: int, base: float, rotated: int) -> list[float]:
    """Return by what Llama 3's scaling divides each frequency."""
    factors = []
    for number in range(0, rotated, 2):
        turns = context / (2 * math.pi * base ** (number / rotated))
        share = min(max((turns - _LOW) / (_HIGH - _LOW), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors


def _longrope(header: Header, long: list[float], short: list[float]) -> dict[str, Any]:
    context = header.get("context_length")
    original = int(header.get("rope.scaling.original_context_length") or context)
    parameters = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }
    if (attention := header.get("rope.scaling.attn_factor")) is not None:
        parameters["attention_factor"] = float(attention)
    return parameters
