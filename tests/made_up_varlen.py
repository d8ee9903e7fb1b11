"""torch's attention of runs of positions, made up on the CPU after what its sources say.

It stands in for `aten::_flash_attention_forward`, with the checks of the real one, so that what
calls that can be run without a GPU. What it cannot show is that the real one does what its sources
say (`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_llm.worker.model.kernels import varlen
from tests.made_up_gpus import GPUS

UNWRITTEN = 3e4
"""What is in memory that the kernel leaves alone."""


class Kernel:
    """Computes attention, and counts its calls.

    Attributes:
        calls: how often it was called.
        wrong: a factor of what it gives.
        fault: what it fails with, if anything.
    """

    def __init__(self, dtypes: tuple[torch.dtype, ...]) -> None:
        self.calls = 0
        self.wrong = 1.0
        self.fault = ""
        self._dtypes = dtypes

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Compute what FlashAttention 2 does for runs of different lengths."""
        self.calls += 1
        if self.fault:
            raise RuntimeError(self.fault)
        scale, used = options["scale"], options["seqused_k"]
        left, right = options["window_size_left"], options["window_size_right"]
        assert options.get("block_table") is None
        assert options.get("alibi_slopes") is None
        assert options.get("num_splits") == 1
        assert dropout_p == 0
        assert not return_debug_mask
        assert cum_seq_q is not None
        assert cum_seq_k is not None
        tokens, heads, dim = query.shape
        for states in (query, key, value):
            assert states.dtype == query.dtype
            assert states.dtype in self._dtypes
            assert states.stride(-1) == 1
        assert key.shape == value.shape
        assert key.shape[2] == dim
        assert dim <= 256
        assert dim % 8 == 0
        assert heads % key.shape[1] == 0
        runs = len(cum_seq_q) - 1
        assert runs > 0
        for told in (cum_seq_q, cum_seq_k, used):
            assert told.dtype == torch.int32
            assert told.is_contiguous()
            assert told.device == query.device
        assert cum_seq_k.shape == (runs + 1,)
        assert used.shape == (runs,)
        ends, starts, lengths = cum_seq_q.tolist(), cum_seq_k.tolist(), used.tolist()
        attended = torch.full_like(query, UNWRITTEN, memory_format=torch.contiguous_format)
        lse = torch.full((heads, tokens), UNWRITTEN, dtype=torch.float32)
        for run in range(runs):
            there = slice(ends[run], ends[run + 1])
            count, length = there.stop - there.start, lengths[run]
            assert 0 <= count <= max_q
            assert 0 < length <= max_k
            held = slice(starts[run], starts[run] + length)
            assert held.stop <= len(key)
            keys, values = (
                each[held].float().repeat_interleave(heads // key.shape[1], dim=1)
                for each in (key, value)
            )
            scores = torch.einsum("qhd,khd->hqk", query[there].float(), keys) * scale
            place = torch.arange(length) - (torch.arange(count)[:, None] + length - count)
            hidden = (place > 0) if is_causal or right == 0 else torch.zeros_like(place).bool()
            assert right in (-1, 0)
            hidden = hidden | (place < -left) if left >= 0 else hidden
            scores.masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(scores, dim=-1).to(query.dtype).float()
            there_values = torch.einsum("hqk,khd->qhd", weights, values) * self.wrong
            attended[there] = there_values.to(query.dtype)
            lse[:, there] = torch.logsumexp(scores, dim=-1)
        unused = torch.empty(0)
        return attended, lse, unused, unused, unused


@contextmanager
def made_up(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> Iterator[Kernel]:
    """Let the CPU count as a GPU that has the kernel, for these dtypes."""
    kernel = Kernel(dtypes)
    with monkeypatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", kernel, "CPU")
        patch.setattr(varlen, "facts_of", lambda device: GPUS["cuda"])
        patch.setattr(varlen, "_DTYPES", dtypes)
        patch.setattr(varlen, "_right", {})
        yield kernel
