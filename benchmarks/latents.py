"""How fast a model with latent attention decodes, against transformers' own `generate`.

    python -m benchmarks.latents [--rounds 2] [--tokens 6]

Eight layers with random weights in the widths of GLM-4.7-Flash, with few and small experts, in
bfloat16, with one thread in this process. What was read before is made up: the KV caches of both
sides are filled with random latents, for reading 8 texts of 4,096 tokens takes minutes. Both decode
in turns (A B A B); figures are the best of each, by seconds of the processor, so that others that
use it do not count.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.common import print_table
from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model.stage import Stage

_CONFIG = Glm4MoeLiteConfig(
    hidden_size=2048,
    num_hidden_layers=8,
    num_attention_heads=20,
    num_key_value_heads=20,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    intermediate_size=4096,
    moe_intermediate_size=256,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    vocab_size=32_000,
    max_position_embeddings=16_384,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_TARGET = 1.2


def _latents(sequences: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return latents and shared keys of one layer, [sequences, 1, positions, dim] each."""
    dims = (_CONFIG.kv_lora_rank, _CONFIG.qk_rope_head_dim)
    made = [torch.randn(sequences, 1, positions, dim).bfloat16() for dim in dims]
    return made[0], made[1]


class _Ours:
    """A stage with all layers."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        layers = LayerRange(0, checkpoint.num_layers)
        cpu = torch.device("cpu")
        self._stage = Stage.load(checkpoint, layers, device=cpu, dtype=torch.bfloat16)

    @torch.inference_mode()
    def decode_s(self, sequences: int, positions: int, tokens: int) -> float:
        """Return the seconds that so many tokens of each sequence take, after `positions`."""
        self._stage.reset()
        cache = self._stage._cache
        for one in map(SequenceId, range(sequences)):
            cache.begin(one, 0, np.ones(positions, dtype=np.int32))
            for layer in range(_CONFIG.num_hidden_layers):
                latents, shared = _latents(1, positions)
                cache.append(layer, one, 0, shared[0], latents[0])
            cache.commit(one, positions)
        ids = torch.ones(sequences, dtype=torch.int32)
        ids = self._step(ids, positions)  # its buffers grow
        began = time.thread_time()
        for step in range(1, tokens + 1):
            ids = self._step(ids, positions + step)
        return time.thread_time() - began

    def _step(self, ids: Tensor, position: int) -> Tensor:
        parts = [
            SequenceSlice(
                sequence_id=SequenceId(one),
                start=position,
                num_tokens=1,
                sample=True,
                sampling=Sampling(),
            )
            for one in range(len(ids))
        ]
        output = self._stage.run(parts, ids, None)
        assert output.token_ids is not None
        return output.token_ids


class _Theirs:
    """transformers' `generate`."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = Glm4MoeLiteForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.inference_mode()
    def decode_s(self, sequences: int, positions: int, tokens: int) -> float:
        """Return the seconds that so many tokens of each sequence take, after `positions`."""
        cache = DynamicCache(config=self._model.config)
        for layer in range(_CONFIG.num_hidden_layers):
            cache.update(*_latents(sequences, positions), layer)
        ids = torch.ones((sequences, positions + 1), dtype=torch.int64)
        began = time.thread_time()
        made = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
        )
        took = time.thread_time() - began
        assert made.shape == (sequences, positions + 1 + tokens)
        return took


def _best_in_turns(
    sides: tuple[Callable[[int], float], Callable[[int], float]],
    rounds: int,
    tokens: tuple[int, int],
) -> list[float]:
    """Return the least seconds per step of each side."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for i, (side, count) in enumerate(zip(sides, tokens, strict=True)):
            best[i] = min(best[i], side(count) / count)
    return best


def main() -> None:
    """Print a table: tokens per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=8, help="ours; theirs half as many")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind: Any = Glm4MoeLiteForCausalLM
        kind._from_config(_CONFIG, dtype=torch.bfloat16).save_pretrained(folder)
        ours, theirs = _Ours(folder), _Theirs(folder)
        for sequences in given.sequences:
            for positions in given.contexts:
                sides = (
                    lambda count, s=sequences, p=positions: ours.decode_s(s, p, count),
                    lambda count, s=sequences, p=positions: theirs.decode_s(s, p, count),
                )
                counts = (given.tokens, max(2, given.tokens // 2))
                own, other = (sequences / t for t in _best_in_turns(sides, given.rounds, counts))
                met = "yes" if own / other >= _TARGET else "no"
                rows.append((sequences, positions, own, other, own / other, _TARGET, met))
                print(*rows[-1], flush=True)
    head = ("sequences", "positions each", "ours, tokens/s", "transformers", "ratio", "target")
    print_table((*head, "met"), rows)


if __name__ == "__main__":
    main()
