"""Times encoder-decoders of the shapes of FLAN-T5-large and BART-large against `generate`.

Both run in this process, in turns, with one thread: `python -m benchmarks.encoder_decoders`. The
weights are random, and there are fewer layers than in the models.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.sampling_params import Sampling
from tests.encoder_decoders import START, build, numbers
from tests.model.stack_driver import StackPipeline

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "t5": {
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_heads": 16,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
    "bart": {
        "d_model": 1024,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
    },
}
SOURCE, TOKENS, ROUNDS = 128, 16, 3
BATCHES = (1, 16)


def generated_s(model: Any, sources: torch.Tensor) -> tuple[float, float]:
    """Return the seconds until the first token, and of each after it, that `generate` takes."""
    took = []
    for tokens in (1, 1 + TOKENS):
        began = perf_counter()
        model.generate(
            sources,
            attention_mask=torch.ones_like(sources),
            decoder_input_ids=torch.full((len(sources), 1), START),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            forced_eos_token_id=None,
        )
        took.append(perf_counter() - began)
    return took[0], (took[1] - took[0]) / TOKENS


def written_s(pipeline: StackPipeline, sources: torch.Tensor) -> tuple[float, float]:
    """Return the same of a stage with all layers."""
    for stage in pipeline.stages:
        stage.reset()
    pipeline.sources, pipeline.answers = [], []
    began = perf_counter()
    pipeline.read(sources.tolist(), (START,))
    marks = []
    for length in range(1, 2 + TOKENS):
        parts = [(i, length - 1, length) for i in range(len(sources))]
        for answer, token in zip(pipeline.answers, pipeline.step(parts, Sampling()), strict=True):
            answer.append(token)
        marks.append(perf_counter())
    return marks[0] - began, (marks[-1] - marks[0]) / TOKENS


def main() -> None:
    """Print the medians, and how many times as fast a stage is."""
    torch.set_num_threads(1)
    print(
        "| shape | sequences | generate: first token, further ones, ms | a stage | times as fast |"
    )
    print("|---|---|---|---|---|")
    for model_type, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = build(model_type, **shape)
            model.save_pretrained(folder)
            pipeline = StackPipeline(open_checkpoint(Path(folder)))
            for batch in BATCHES:
                sources = torch.tensor([numbers(SOURCE, seed) for seed in range(batch)])
                pairs = [
                    (generated_s(model, sources), written_s(pipeline, sources))
                    for _ in range(ROUNDS)
                ]
                theirs, ours = (
                    [median(pair[who][part] for pair in pairs) for part in (0, 1)] for who in (0, 1)
                )
                cells = [f"{1000 * a:.1f}, {1000 * b:.1f}" for a, b in (theirs, ours)]
                times = [f"{a / b:.2f}" for a, b in zip(theirs, ours, strict=True)]
                print(f"| {model_type} | {batch} | {cells[0]} | {cells[1]} | {', '.join(times)} |")


if __name__ == "__main__":
    main()
