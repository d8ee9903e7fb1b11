"""Whole models from GGUF files, split in two, answer as they did before they were written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedModel

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.model.weights import load_stage_model
from tests.checkpoints import build_model
from tests.gguf_cases import CASES, WRITTEN
from tests.gguf_models import open_here, write_gguf
from tests.model.driver import CPU, load_stages

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38]


def differences(model: PreTrainedModel, file: Path, texts: Path) -> Tensor:
    """Return how far log-probabilities of a served file are from those of the model, by token."""
    stages = load_stages(open_here(file, texts), [1, model.config.num_hidden_layers - 1])
    asked = SequenceSlice(
        sequence_id=SequenceId(0),
        start=0,
        num_tokens=len(PROMPT),
        sample=True,
        sampling=Sampling(logprobs=20),
    )
    ids = torch.tensor(PROMPT, dtype=torch.int32)
    hidden = stages[0].run([asked], ids, None).hidden_states
    output = stages[1].run([asked], ids, hidden)
    assert output.logprobs is not None
    assert output.logprob_ids is not None
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert output.logprob_ids[0, 0] == expected.argmax()
    return torch.sub(output.logprobs[0], expected[output.logprob_ids[0].long()]).abs()


@pytest.mark.parametrize("case", CASES)
def test_what_a_split_model_answers(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    model = build_model(family, **{"num_layers": 2, "vocab_size": 320, **settings})
    file = write_gguf(tmp_path / "m.gguf", model, **WRITTEN.get(case, {}))
    assert differences(model, file, tmp_path / "texts").max() < 1e-4


@pytest.mark.parametrize(
    ("case", "written"),
    [("gpt_oss", {"by_ollama": True}), ("qwen2vl", {"architecture": "qwen25vl"})],
)
def test_files_of_ollama_itself(tmp_path: Path, case: str, written: dict[str, Any]) -> None:
    family, settings = CASES[case]
    model = build_model(family, num_layers=2, vocab_size=320, **settings)
    file = write_gguf(tmp_path / "m.gguf", model, **written)
    assert differences(model, file, tmp_path / "texts").max() < 1e-4


def test_experts_stay_quantized(tmp_path: Path) -> None:
    """Gates and ups of gpt-oss take turns in the model, and lie the other way round."""
    settings = {**CASES["gpt_oss"][1], "hidden_size": 64, "intermediate_size": 64}
    model = build_model("gpt_oss", num_layers=2, vocab_size=320, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                lying = parameter.transpose(1, 2).numpy()
                blocks = quantize(lying, GGMLQuantizationType.MXFP4)
                values = dequantize(blocks, GGMLQuantizationType.MXFP4)
                parameter.copy_(torch.from_numpy(values).transpose(1, 2))
    file = write_gguf(tmp_path / "m.gguf", model, "MXFP4", experts_alone=True)
    assert differences(model, file, tmp_path / "texts").max() < 0.15
    loaded = load_stage_model(
        open_here(file, tmp_path / "again"), LayerRange(0, 2), device=CPU, dtype=torch.float32
    )
    kinds = [type(module).__name__ for module in loaded.model.modules()]
    assert kinds.count("QuantLinear") == 2 * 2 * 4  # layers, products, experts
