"""Which models keep latents: what all heads' keys and values are made of, once per position.

Latent attention (MLA: DeepSeek-AI, 2024) projects hidden states to a short latent and a part of a
key that all heads share, and these to the keys and values of every head. Pure.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

KEEPS_LATENTS: frozenset[str] = frozenset(
    {
        "axk1",
        "axk2",
        "bailing_hybrid",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "hy_v4",
        "kimi_linear",
        "longcat_flash",
        "minicpm3",
        "mistral4",
        "youtu",
    }
)
"""Model types whose attention gives its latents away; others keep keys and values of each head."""


def keeps_latents(config: Mapping[str, Any]) -> bool:
    """Return whether the layers of a model of this config keep latents in their KV cache."""
    return config.get("model_type") in KEEPS_LATENTS


class LatentSizes(NamedTuple):
    """What latent attention consists of, in numbers.

    Attributes:
        rank: of a latent.
        shared_dim: of the part of a key that all heads share.
        key_dim: of the other part, which is made of the latent for each head.
        value_dim: of a value of one head, which is made of the latent, too.
    """

    rank: int
    shared_dim: int
    key_dim: int
    value_dim: int

    @property
    def made(self) -> int:
        """Products that make keys and values of a latent for one head, or absorb a query."""
        return self.rank * (self.key_dim + self.value_dim)

    @property
    def longer(self) -> int:
        """By how many products a query and a latent take more than a query with key and value."""
        return self.shared_dim + 2 * self.rank - 2 * self.expanded_dim

    @property
    def expanded_dim(self) -> int:
        """Numbers that keys and values of a head take, of which the shorter end in zeros."""
        return max(self.shared_dim + self.key_dim, self.value_dim)


def absorbing_is_faster(sizes: LatentSizes, tokens: int, positions: int) -> bool:
    """Return whether a chunk had better attend to latents as they are than to what is made of them.

    Args:
        sizes: of the layer.
        tokens: of the chunk.
        positions: that its last token sees.
    """
    pairs = tokens * (positions - tokens / 2)
    return pairs * sizes.longer < (positions - tokens) * sizes.made


def most_absorbed(sizes: LatentSizes, tokens: int) -> int:
    """Return up to how many of a chunk's `tokens` attend to latents as they are, after any text."""
    return tokens if sizes.longer <= 0 else min(tokens, sizes.made // sizes.longer)
