"""Whether a stage keeps its KV cache in pages: where a kernel reads them as they are.

Whatever else reads pages gathers them first, in each step. So they are for devices and models whose
layers attend by that kernel; other models, and other devices, keep buffers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from distributed_llm.common.block_indexers import block_sizes
from distributed_llm.common.encoder_decoders import is_encoder_decoder
from distributed_llm.common.key_blocks import key_block_sizes
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.latents import keeps_latents
from distributed_llm.common.layer_states import keeps_kv
from distributed_llm.common.model_sizes import head_sizes
from distributed_llm.worker.model.kernels import varlen

_OTHERWISE = ("bloom", "mpt", "gemma4_text")
"""Model types whose scores have a bias that nothing tells of, or whose heads are too wide."""


def in_pages(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, kv_dtype: KVDtype
) -> bool:
    """Return whether a stage keeps its KV cache in pages.

    Args:
        config: of the model.
        device: of the stage; tried when it is first asked for.
        dtype: of the computation.
        kv_dtype: how keys and values are kept.
    """
    if not varlen.may_be_offered(device) or kv_dtype != "auto" or not attends_plainly(config):
        return False
    return varlen.is_right(device, dtype, head_sizes(config).key_dim)


def attends_plainly(config: Mapping[str, Any]) -> bool:
    """Return whether scores are products of queries and keys, and nothing is added or chosen."""
    if is_encoder_decoder(config) or not any(keeps_kv(config)) or keeps_latents(config):
        return False
    if block_sizes(config) is not None or key_block_sizes(config) is not None:
        return False
    if config.get("attn_logit_softcapping") or config.get("alibi"):
        return False
    sizes = head_sizes(config)
    return config.get("model_type") not in _OTHERWISE and sizes.key_dim == sizes.value_dim
