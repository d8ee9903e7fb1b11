"""Packed experts give what transformers' own give; what is no stack of experts stays as it is."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model import experts as experts_module
from distributed_llm.worker.model.experts import (
    PackedExperts,
    expert_stacks,
    grouped_rows,
    pack_experts,
)
from distributed_llm.worker.model.kernels import packed_nbytes
from distributed_llm.worker.model.quantized.affine import AffineWeight
from distributed_llm.worker.model.quantized.quantize import quantized

EXPERTS, HIDDEN, INNER = 6, 64, 32
KINDS = (Qwen3MoeExperts, GptOssExperts, NemotronHExperts, MuseSparkExperts)


@pytest.fixture(autouse=True)
def all_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every matrix be worth a layer of its own, whatever the machine and the size."""
    monkeypatch.setattr(experts_module, "fastest_linear", Faster)


class Faster(nn.Module):
    """Stands for a packed layer; counts its calls."""

    fewest_rows = 1

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.calls = 0
        self.rows: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        self.rows.append(len(states))
        output: Tensor = self.linear(states)
        return output


def make(kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return random experts of a model's own class, computed by its own loop."""
    config = SimpleNamespace(
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
        hidden_act="silu",
        mlp_hidden_act="relu2",
        moe_latent_size=None,
        swiglu_alpha=1.7,
        swiglu_limit=1.0,
        post_norm_eps=1e-6,
        _experts_implementation="eager",
    )
    torch.manual_seed(1)
    module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.to(dtype).requires_grad_(False)


def routed(tokens: int, chosen: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, and for each token its experts, never the last, and their weights."""
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, HIDDEN, generator=generator)
    weights, index = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(chosen)
    return states, index, weights


@pytest.mark.parametrize("fewest_rows", [1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_compute_what_the_models_own_do(
    kind: Any, tokens: int, fewest_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faster, "fewest_rows", fewest_rows)
    model: Any = nn.Sequential(make(kind))
    states, index, weights = routed(tokens)
    expected = model[0](states, index, weights)
    pack_experts(model)
    assert isinstance(model[0], PackedExperts)
    torch.testing.assert_close(model[0](states, index, weights), expected)


def test_rows_are_repeated_only_where_experts_have_fewer_on_average() -> None:
    few = grouped_rows([5, 2, 5, 0], fewest=4)
    assert few.experts == [0, 2, 5]
    assert few.sizes == [4, 4, 4]
    assert few.rows == [3, 3, 3, 3, 1, 1, 1, 1, 0, 2, 0, 0]
    assert [few.rows[place] for place in few.places] == [0, 1, 2, 3]
    many = grouped_rows([2, 2, 2, 2, 1, 2, 2, 2], fewest=4)
    assert (many.experts, many.sizes) == ([1, 2], [1, 7])
    assert [many.rows[place] for place in many.places] == list(range(8))


def test_layers_say_how_many_rows_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faster, "fewest_rows", 3)
    model: Any = nn.Sequential(make(Qwen3MoeExperts))
    pack_experts(model)
    model[0](*routed(1))
    assert [rows for layer in model[0].up for rows in layer.rows] == [3, 3]


def test_experts_that_no_token_chose_are_not_computed() -> None:
    model: Any = nn.Sequential(make(Qwen3MoeExperts))
    pack_experts(model)
    states, index, weights = routed(40)
    model[0](states, index, weights)
    for layers in (model[0].up, model[0].down):
        assert [layer.calls for layer in layers] == [1] * (EXPERTS - 1) + [0]


def test_a_stack_is_let_go_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(make(GptOssExperts))
    held: Any = StorageWeakRef
    stacks = [
        held(stack.untyped_storage()) for stack in (model[0].gate_up_proj, model[0].down_proj)
    ]
    alive = []

    class Counting(Faster):
        def __init__(self, linear: nn.Linear) -> None:
            alive.append([not stack.expired() for stack in stacks])
            super().__init__(linear)

    monkeypatch.setattr(experts_module, "fastest_linear", Counting)
    pack_experts(model)
    assert alive[-EXPERTS:] == [[False, True]] * EXPERTS
    assert all(stack.expired() for stack in stacks)


def test_experts_stay_as_they_are_where_packing_does_not_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts_module, "fastest_linear", lambda linear: linear)
    module = make(GptOssExperts)
    model: Any = nn.Sequential(module)
    before = copy.deepcopy(module.state_dict())
    pack_experts(model)
    assert model[0] is module
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


class _MoreThanStacks(Qwen3MoeExperts):
    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        self.scale = nn.Parameter(torch.ones(1))


def test_what_is_no_known_stack_of_experts_stays_as_it_is() -> None:
    sizes = {"ffn_hidden_size": INNER, "ffn_act_fn": {"name": "silu"}}
    kind: Any = DbrxExperts
    dbrx = kind(SimpleNamespace(hidden_size=HIDDEN, moe_num_experts=EXPERTS, **sizes))
    others = [dbrx, JetMoeParallelExperts(EXPERTS, HIDDEN, INNER), make(_MoreThanStacks)]
    model: Any = nn.Sequential(*others)
    pack_experts(model)
    assert list(model) == others
    assert expert_stacks(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("form", [INT8, WeightForm(4, 32)], ids=str)
@pytest.mark.parametrize("kind", [Qwen3MoeExperts, GptOssExperts])
def test_experts_of_integers_compute_with_these(kind: Any, form: WeightForm) -> None:
    """As a reference the model's own experts get the values that the integers stand for."""
    module = make(kind)
    stacks = expert_stacks(module)
    assert stacks is not None
    integers = {}
    for name in (stacks.up, stacks.down):
        stack = module.get_parameter(name)
        integers[name] = quantized(stack.mT if stacks.transposed else stack, form)
        values = integers[name].dequantized()
        stack.copy_(values.mT if stacks.transposed else values)
    arguments = routed(7)
    expected = module(*arguments)
    made = PackedExperts.of(
        module, torch.float32, up=integers[stacks.up], down=integers[stacks.down]
    )
    error = (made(*arguments) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.03  # kernels of integers round what they multiply with, too
    assert 0 < packed_nbytes(made) < 2 * EXPERTS * 3 * HIDDEN * INNER


def test_each_expert_may_have_its_own_order_of_inputs() -> None:
    module = make(Qwen3MoeExperts)
    whole = quantized(module.gate_up_proj, WeightForm(4, 32))
    order = torch.stack([torch.randperm(HIDDEN) for _ in range(EXPERTS)])
    ordered = AffineWeight(whole.codes, whole.scales, whole.offsets, whole.bits, order)
    for expert, values in enumerate(whole.dequantized()):
        module.gate_up_proj[expert][:, order[expert]] = values
    arguments = routed(7)
    expected = module(*arguments)
    made = PackedExperts.of(module, torch.float32, up=ordered)
    error = (made(*arguments) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.03
