"""Encoder-decoders with narrow floats and integers are near transformers, which has float32."""

from pathlib import Path

import pytest
import torch

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.inspect_model import model_cost
from tests.encoder_decoders import ENCODER_LAYERS, START, build, make, numbers
from tests.model.stack_driver import StackPipeline

SOURCE = numbers(9, 9)
FORMS: list[tuple[DtypeName, Quantize, float]] = [
    ("float16", "none", 0.02),
    ("bfloat16", "none", 0.2),
    ("float32", "int8", 0.2),
    ("float16", "int8", 0.2),
    ("float32", "int4", 1.0),
    ("bfloat16", "int4", 1.0),
]
"""And how far a logarithm of a probability may be off."""


@pytest.mark.parametrize("model_type", ["t5", "umt5", "bart"])
def test_narrow_weights_are_near_transformers(tmp_path: Path, model_type: str) -> None:
    checkpoint = open_checkpoint(make(tmp_path, model_type))
    with torch.inference_mode():
        logits = build(model_type)(
            input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([[START]])
        ).logits[0, -1]
    wanted = torch.log_softmax(logits, dim=-1)
    for dtype, quantize, apart in FORMS:
        pipeline = StackPipeline(
            checkpoint, (1, ENCODER_LAYERS + 1), dtype=getattr(torch, dtype), quantize=quantize
        )
        pipeline.read([SOURCE], (START,))
        (token,) = pipeline.step([(0, 0, 1)], Sampling(logprobs=0))
        assert pipeline.latest.logprobs is not None
        found = float(pipeline.latest.logprobs[0, 0])
        assert found == pytest.approx(float(wanted[token]), abs=apart), f"{dtype}, {quantize}"
        cost = model_cost(checkpoint, dtype, quantize)
        for stage in pipeline.stages:
            assert stage.weight_bytes == cost.weight_bytes(stage.layers), stage.layers
