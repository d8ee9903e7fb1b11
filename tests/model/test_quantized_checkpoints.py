"""Whole models from quantized files, split in two, against the same numbers in transformers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.formats import formats_of
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.summary import formats_text
from distributed_llm.worker.model.stage import Stage
from tests.model.driver import load_stages
from tests.quantized_checkpoints import KINDS, make_quantized

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38]
EXACT, ROUNDED = 0.05, 0.3
"""How far log-probabilities may be from those of transformers: kernels round what they compute
with, and what no form holds is rounded before."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_split_model_answers(kind: str, tmp_path: Path) -> None:
    quantized, plain = make_quantized(tmp_path, kind)
    checkpoint = open_checkpoint(quantized)
    schemes = [(w.scheme, w.shape) for w in checkpoint.weights.values() if w.scheme]
    exact = all(scheme.is_exact(shape) for scheme, shape in schemes)
    stages = load_stages(checkpoint, [1, 1])
    asked = SequenceSlice(
        sequence_id=SequenceId(0),
        start=0,
        num_tokens=len(PROMPT),
        sample=True,
        sampling=Sampling(logprobs=20),
    )
    hidden = stages[0].run([asked], torch.tensor(PROMPT, dtype=torch.int32), None).hidden_states
    output = stages[1].run([asked], torch.tensor(PROMPT, dtype=torch.int32), hidden)
    assert output.logprobs is not None
    assert output.logprob_ids is not None
    whole = AutoModelForCausalLM.from_pretrained(plain)
    with torch.inference_mode():
        expected = whole(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    found = output.logprobs[0] - expected[output.logprob_ids[0].long()]
    assert found.abs().max() < (EXACT if exact else ROUNDED)


@pytest.mark.parametrize("kind", ["awq", "fp8"])
def test_scales_that_are_no_numbers_are_refused_while_loading(kind: str, tmp_path: Path) -> None:
    """Else the failure would come with the first answer, and blame the machine."""
    quantized, _ = make_quantized(tmp_path, kind)
    path = quantized / "model.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if re.search(r"\.scales$|weight_scale", name))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(quantized)
    layers = LayerRange(0, checkpoint.num_layers)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its scales"):
        Stage.load_unchecked(checkpoint, layers, device=torch.device("cpu"), dtype=torch.float32)


TOLD = {
    "gptq": "GPTQ (4 bits, groups of 32) and float32 in the files, int4 (groups of 32) and float32 "
    "in memory",
    "awq": "AWQ (4 bits, groups of 32) in the files, int4 (groups of 32) in memory",
    "nf4": "bitsandbytes NF4 in the files, int8 in memory, by the nearest numbers that there are",
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_people_are_told_of_them(kind: str, tmp_path: Path) -> None:
    """A list within a list is in parentheses."""
    quantized, _ = make_quantized(tmp_path, kind)
    found = formats_of(open_checkpoint(quantized), "float32", "none")
    assert formats_text(found.files, found.memory, exact=found.exact) == TOLD[kind]
