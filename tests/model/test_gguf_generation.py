"""Whole models from GGUF files, split in two, answer as they did before they were written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import SequenceId
from tests.checkpoints import build_model
from tests.gguf_models import open_here, write_gguf
from tests.model.driver import load_stages

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie": True}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {"layer_types": ["sliding_attention"]}),
        ("mixtral", {"sliding_window": None}),
        ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}),
        ("phi3", {}),
        ("granite", {}),
        ("cohere", {"use_qk_norm": True}),
        ("cohere2", {"layer_types": ["sliding_attention"], "sliding_window": 5}),
    ],
)
def test_what_a_split_model_answers(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    model = build_model(family, num_layers=2, vocab_size=320, **settings)
    checkpoint = open_here(write_gguf(tmp_path / "m.gguf", model), tmp_path / "texts")
    stages = load_stages(checkpoint, [1, 1])
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
    torch.testing.assert_close(output.logprobs[0], expected[output.logprob_ids[0].long()])
