"""Layers that get the same states are computed together, and none notices."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distributed_llm.common.weight_forms import INT8, WeightForm
from distributed_llm.worker.model.kernels import native
from distributed_llm.worker.model.kernels.native import JointProduct
from distributed_llm.worker.model.quantized import shared_states
from distributed_llm.worker.model.quantized.linear import QuantLinear, share_states
from distributed_llm.worker.model.quantized.quantize import quantized

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)

INPUTS = 512
CHANNELS = {"q": 512, "k": 128, "v": 144, "o": 512}


class Layers(nn.Module):
    """Four layers, of which a caller uses those it wants."""

    def __init__(self, form: WeightForm, bias: bool) -> None:
        super().__init__()
        self.apart: dict[str, QuantLinear] = {}
        for name, channels in CHANNELS.items():
            weight = quantized(torch.randn(channels, INPUTS), form)
            offset = torch.randn(channels) if bias else None
            self.apart[name] = QuantLinear.of(weight, offset, torch.bfloat16)
            self.add_module(name, QuantLinear.of(weight, offset, torch.bfloat16))
        share_states(self)

    def check(self, name: str, states: Tensor) -> None:
        """Compare a layer to one that shares nothing, to the last bit."""
        assert torch.equal(self.get_submodule(name)(states), self.apart[name](states))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each call of several has had."""
    sizes: list[int] = []

    class Counted(JointProduct):
        def __call__(self, states: Tensor) -> list[Tensor]:
            products = super().__call__(states)
            sizes.append(len(products))
            return products

    monkeypatch.setattr(shared_states, "JointProduct", Counted)
    return sizes


def states_of(*shape: int) -> Tensor:
    return torch.randn(*shape, INPUTS).bfloat16()


@pytest.fixture(params=[INT8, WeightForm(4, 64)], ids=["int8", "int4"])
def layers(request: pytest.FixtureRequest) -> Layers:
    torch.manual_seed(0)
    return Layers(request.param, bias=request.param is INT8)


@torch.inference_mode()
def test_what_is_called_with_one_tensor_is_computed_in_one_call(
    layers: Layers, calls: list[int]
) -> None:
    for step in range(4):
        states = states_of(1, 1 + step)
        for name in ("q", "k", "v"):
            layers.check(name, states)
        layers.check("o", states_of(1, 1 + step))
        assert calls == [3] * step, "the first time shows who belongs together"


@torch.inference_mode()
def test_equal_states_in_another_tensor_are_others(layers: Layers, calls: list[int]) -> None:
    for _ in range(3):
        states = states_of(2)
        for name in ("q", "k", "v"):
            layers.check(name, states.clone())
    assert not calls


@torch.inference_mode()
def test_a_layer_that_is_not_called_any_more_is_not_computed(
    layers: Layers, calls: list[int]
) -> None:
    for names in (("q", "k", "v"), ("q", "k"), ("q", "k"), ("q", "k"), ("q", "k")):
        states = states_of(1)
        for name in names:
            layers.check(name, states)
    assert calls == [3, 2, 2], "one was in vain, one showed who belongs together now"


@torch.inference_mode()
def test_nothing_is_kept_once_all_have_what_is_theirs(layers: Layers) -> None:
    for rows in (1, 2, 200):
        states = states_of(rows)
        for name in ("q", "k", "v"):
            layers.check(name, states)
    shared = layers.get_submodule("q")._shared
    assert isinstance(shared, shared_states.SharedStates)
    assert shared._made is None


@torch.inference_mode()
def test_two_threads_may_use_the_same_layers(layers: Layers) -> None:
    """As stages of an old and a new plan do: whatever the order of their calls."""
    turns: list[Callable[[], None]] = []
    for _ in range(3):
        mine, theirs = states_of(1), states_of(1)
        for states, names in (
            *((mine, "qk"), (theirs, "qkv"), (mine, "v"), (theirs, "q")),
            *((mine, "k"), (theirs, "kv"), (mine, "q"), (theirs, "qk"), (mine, "kv")),
        ):
            turns += [partial(layers.check, name, states) for name in names]
    for turn in turns:
        turn()


def test_small_layers_and_other_shapes_share_nothing() -> None:
    model = nn.Module()
    for name, inputs in (("a", 512), ("b", 1024)):
        weight = quantized(torch.randn(256, inputs), INT8)
        model.add_module(name, QuantLinear.of(weight, None, torch.bfloat16))
    share_states(model)
    assert all(layer._shared is None for layer in model.children())
