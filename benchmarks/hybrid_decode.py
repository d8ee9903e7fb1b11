"""Times decoding of a hybrid, random and of the shape of a small Qwen3.5, against `generate`.

Both run in this process, in turns, with one thread: `python -m benchmarks.hybrid_decode`.
"""

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import build_model
from tests.model.driver import CPU, Pipeline

LAYERS = 8
VOCAB_SIZE = 8192
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
}
PROMPT, TOKENS, ROUNDS = 64, 16, 3


def generated_s(model: Any, prompt: list[int]) -> float:
    """Return the seconds that `generate` takes for a token after the first."""
    token_ids = torch.tensor([prompt])
    took = []
    for tokens in (1, 1 + TOKENS):
        began = perf_counter()
        model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        took.append(perf_counter() - began)
    return (took[1] - took[0]) / TOKENS


def decoded_s(stage: Stage, prompt: list[int], sequences: int) -> float:
    """Return the seconds that a stage takes for a step of a token of each sequence."""
    stage.reset()
    pipeline = Pipeline([stage])
    pipeline.prefill([prompt] * sequences, [len(prompt)] * sequences)
    for text in pipeline.texts:
        text.append(1)
    began = perf_counter()
    for _ in range(TOKENS):
        pipeline.decode()
    return (perf_counter() - began) / TOKENS


def main() -> None:
    """Print milliseconds per token of both, and how they compare."""
    torch.set_num_threads(1)
    model: Any = build_model("qwen3_5_text", num_layers=LAYERS, **SHAPE)
    model.to(torch.bfloat16)
    prompt = torch.randint(VOCAB_SIZE, (PROMPT,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        layers = LayerRange(0, LAYERS)
        checkpoint = open_checkpoint(Path(folder))
        stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.bfloat16)
        for _ in range(ROUNDS):
            alone, ours = generated_s(model, prompt), decoded_s(stage, prompt, 1)
            eight = decoded_s(stage, prompt, 8)
            print(
                f"transformers {alone * 1e3:.1f} ms, a stage {ours * 1e3:.1f} ms "
                f"({alone / ours:.2f} x), eight sequences {eight * 1e3:.1f} ms"
            )


if __name__ == "__main__":
    main()
