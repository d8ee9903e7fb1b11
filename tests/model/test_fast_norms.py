"""RMS norms of the C library are those of transformers, and no other norm is taken for one."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from distributed_llm.worker.model.fast_norms import FastNorm, replace_norms
from distributed_llm.worker.model.kernels import native

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)


class Halved(LlamaRMSNorm):
    """Called a norm, and something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 2


def replaced(norm: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    for weight in norm.parameters():
        nn.init.normal_(weight, 0.8, 0.3)
    model = nn.Sequential(norm.to(dtype))
    replace_norms(model)
    return model[0]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 256), (1, 7, 256), (2, 3, 40, 256)], ids=str)
def test_norms_are_those_of_transformers(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    own = kind(256).bfloat16()
    fast = replaced(own)
    assert isinstance(fast, FastNorm)
    states = (torch.randn(shape) * 5).bfloat16()
    expected, actual = own(states), fast(states)
    assert actual.shape == expected.shape
    assert torch.allclose(actual.float(), expected.float(), rtol=2**-7)
    assert float((actual == expected).float().mean()) > 0.97
    parts = states.transpose(0, -2)  # heads are a view of the states
    assert torch.equal(fast(parts), fast(parts.contiguous()))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, Gemma3RMSNorm])
def test_states_of_float32_are_no_bfloat16(kind: type[nn.Module]) -> None:
    """Mamba's layers add their outputs up in float32, and its last norm takes the sum."""
    own = kind(256).bfloat16()
    fast = replaced(own)
    states = torch.randn(1, 7, 256) * 5
    torch.testing.assert_close(fast(states), own(states))


@pytest.mark.parametrize("norm", [Halved(256), NanoChatRMSNorm(256), Qwen3NextRMSNormGated(256)])
def test_other_norms_stay(norm: nn.Module) -> None:
    assert replaced(norm) is norm


def test_norms_of_float32_stay() -> None:
    norm = LlamaRMSNorm(256)
    assert replaced(norm, torch.float32) is norm


def test_a_state_that_is_no_number_spoils_its_own_row_only() -> None:
    fast = replaced(LlamaRMSNorm(64))
    states = torch.randn(3, 64).bfloat16()
    good = fast(states)
    states[1, 5] = float("nan")
    output = fast(states)
    assert output[1].isnan().all()
    assert torch.equal(output[[0, 2]], good[[0, 2]])
