"""Samples the rows of a step in blocks, so that their number does not tell the memory it takes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.workspace import LOGITS_AT_ONCE
from distributed_llm.worker.kv.segments import TokenIds
from distributed_llm.worker.model.logits import Mask
from distributed_llm.worker.model.sampler import RowsFailed, log_probabilities, sample


class RowToSample(NamedTuple):
    """What the token of a row of logits depends on.

    Attributes:
        sampling: parameters.
        position: of the token in its sequence.
        history: the tokens before it, int32.
        mask: which tokens may be sampled; None: all.
    """

    sampling: Sampling
    position: int
    history: TokenIds
    mask: Mask | None


class SampledRows(NamedTuple):
    """The tokens of some rows, as in `StageOutput`.

    Attributes:
        token_ids: int32 [rows].
        logprobs: float32 [rows, 1 + tokens], zeros for rows that do not ask for them; None if none
            does.
        logprob_ids: int32, the tokens that they belong to; or None.
    """

    token_ids: Tensor
    logprobs: Tensor | None
    logprob_ids: Tensor | None


def sample_rows(logits: Tensor, rows: Sequence[RowToSample]) -> SampledRows:
    """Return a token for each row of logits [rows, vocab_size], which are finite.

    Raises:
        RowsFailed: as `sample`.
    """
    size = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    count = max((row.sampling.logprobs or 0 for row in rows), default=0)
    asked = any(row.sampling.logprobs is not None for row in rows)
    blocks = [
        _sample_block(logits[start : start + size], rows[start : start + size], start, count, asked)
        for start in range(0, len(rows), size)
    ]
    if len(blocks) == 1:
        return blocks[0]
    token_ids = torch.cat([block.token_ids for block in blocks])
    if not asked:
        return SampledRows(token_ids, None, None)
    logprobs = [block.logprobs for block in blocks if block.logprobs is not None]
    ids = [block.logprob_ids for block in blocks if block.logprob_ids is not None]
    return SampledRows(token_ids, torch.cat(logprobs), torch.cat(ids))


def _sample_block(
    logits: Tensor, rows: Sequence[RowToSample], start: int, count: int, asked: bool
) -> SampledRows:
    """Sample some rows.

    Args:
        logits: of these rows.
        rows: not empty.
        start: number of the first one among all.
        count: of likeliest tokens whose log-probabilities are returned.
        asked: whether any are wanted, of these or of other rows.
    """
    logits = logits.float()  # once, for all that follows
    try:
        token_ids = sample(
            logits,
            [row.sampling for row in rows],
            [row.position for row in rows],
            [row.history for row in rows],
            [row.mask for row in rows],
        )
    except RowsFailed as exc:
        raise RowsFailed(tuple(start + row for row in exc.rows), exc.error) from exc
    if not asked:
        return SampledRows(token_ids, None, None)
    wanted = [number for number, row in enumerate(rows) if row.sampling.logprobs is not None]
    return SampledRows(token_ids, *log_probabilities(logits, token_ids, count, wanted))
