"""Packed linear layers compute what torch's own do, in no more memory."""

import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model.kernels import (
    PackedLinear,
    chosen,
    kernels_for,
    native,
    orders,
    pack_linear_layers,
    packed_nbytes,
)
from distributed_llm.worker.model.kernels.choice import ROWS
from distributed_llm.worker.model.kernels.memory import new_memory
from distributed_llm.worker.model.kernels.packed import CopiedLinear, FloatLinear, RowLinear
from distributed_llm.worker.model.shared_weights import StageModel
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.model.weights import load_stage_model
from tests.checkpoints import REPRESENTATIVES, VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1 / 64}
DTYPES = [
    pytest.param(
        dtype,
        id=str(dtype).removeprefix("torch."),
        marks=pytest.mark.skipif(
            not orders._packing_helps(str(dtype).removeprefix("torch.")),
            reason="this processor does not pack this dtype",
        ),
    )
    for dtype in TOLERANCE
]


@pytest.fixture
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the small matrices of test models too."""
    monkeypatch.setattr(chosen, "SMALLEST", 1)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare to the rounding of `dtype`, in proportion to the largest value."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(error) < TOLERANCE[dtype]


def load(folder: Path, start: int, stop: int, dtype: torch.dtype) -> StageModel:
    return load_stage_model(
        open_checkpoint(folder), LayerRange(start, stop), device=CPU, dtype=dtype
    )


def names_of_packed(model: nn.Module) -> set[str]:
    """Return the layers whose weights have memory of their own, in whichever order."""
    own = PackedLinear | CopiedLinear
    return {name for name, m in model.named_modules() if isinstance(m, own)}


# ------------------------------------------------------------------ one layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48), (1, 200, 48), (0, 48)])
def test_a_packed_layer_computes_its_product(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 67, bias=bias, dtype=dtype).requires_grad_(False)
    states = torch.randn(shape).to(dtype)
    expected = states.double() @ linear.weight.double().T
    if linear.bias is not None:
        expected = expected + linear.bias.double()
    layers: list[FloatLinear] = [PackedLinear(linear), CopiedLinear(linear)]
    if dtype == torch.bfloat16 and native.instructions() != "none":
        layers[1].use(["native"] * len(ROWS))
    for layer, num_tokens in itertools.product(layers, (1, 2)):
        # the switch for one token is nothing to it
        with torch.inference_mode(), kernels_for(num_tokens):
            output = layer(states)
        assert output.dtype == dtype
        assert output.shape == expected.shape
        if output.numel():
            assert_near(output, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_are_not_contiguous_are_read_rightly(dtype: torch.dtype) -> None:
    linear = nn.Linear(32, 16, dtype=dtype).requires_grad_(False)
    states = torch.randn(1, 32, 10).to(dtype).transpose(1, 2)[:, ::2]
    assert_near(PackedLinear(linear)(states), linear(states), dtype)


def test_a_weight_that_was_read_into_memory_of_its_own_stays_there() -> None:
    rows, columns = 513, 1024  # a part is large too
    read = new_memory(rows * columns * 2).view(torch.bfloat16).view(rows, columns)
    read.copy_(torch.randn(rows, columns))
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    for weight, stays in ((read, True), (read[1:], False), (read.clone(), False)):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        own = CopiedLinear(linear).weight
        assert (own.data_ptr() == weight.data_ptr()) == stays
        assert torch.equal(own, weight)
        assert own.data_ptr() % 4096 == 0  # in pages of its own, which may be large ones


# ------------------------------------------------------------------ a model's layers


class Tree(nn.Module):
    """Linear layers of all kinds: a large one, a small one, two that share, one of another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Linear(256, 256, dtype=dtype)
        self.inner = nn.ModuleList([nn.Linear(256, 300, dtype=dtype)])
        self.small = nn.Linear(256, 255, dtype=dtype)
        self.float16 = nn.Linear(256, 256, dtype=torch.float16)
        self.embedding = nn.Embedding(300, 256, dtype=dtype)
        self.head = nn.Linear(256, 300, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.other = Other(256, 256, dtype=dtype)
        self.requires_grad_(False)


class Other(nn.Linear):
    """What does more than a linear layer may be a subclass of it."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_packed_and_what_is_not(dtype: torch.dtype) -> None:
    model = Tree(dtype)
    pack_linear_layers(model)
    assert names_of_packed(model) == {"large", "inner.0"}
    assert model.head.weight is model.embedding.weight
    assert packed_nbytes(model) >= (256 + 300) * 256 * dtype.itemsize
    assert packed_nbytes(model) < 1.2 * (256 + 300) * 256 * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_let_go_before_the_next_is_packed(
    dtype: torch.dtype, pack_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, dtype=dtype) for _ in range(5)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []

    def counted(make: Callable[[nn.Linear], FloatLinear]) -> Callable[[nn.Linear], FloatLinear]:
        def made(linear: nn.Linear) -> FloatLinear:
            alive.append(sum(weight() is not None for weight in weights))
            return make(linear)

        return made

    for order, make in list(orders.FLOAT.items()):
        monkeypatch.setitem(orders.FLOAT, order, counted(make))
    pack_linear_layers(model)
    assert alive == [5, 4, 3, 2, 1]
    assert not any(weight() for weight in weights)


def test_nothing_is_packed_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_packing_helps", lambda dtype: False)
    model = Tree(torch.float32)
    pack_linear_layers(model)
    assert names_of_packed(model) == set()
    assert packed_nbytes(model) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    assert not orders._packing_helps(str(dtype).removeprefix("torch."))


# ------------------------------------------------------------------ whole stages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_packed_stages_give_what_others_give(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages are packed or not; the hidden states between them and the tokens are compared."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=2))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in (9, 4)]
    hidden_states: list[Tensor] = []
    tokens = []
    for smallest in (1 << 40, 1):
        monkeypatch.setattr(chosen, "SMALLEST", smallest)
        stages = [
            Stage.load(checkpoint, LayerRange(i, i + 1), device=CPU, dtype=dtype) for i in (0, 1)
        ]
        # gpt2 has no linear layers but the head: its others are transposed ("Conv1D").
        assert bool(names_of_packed(stages[1]._forward._model)) == (smallest == 1)
        stages[0]._forward._decoder.register_forward_hook(_keep(stages[0], hidden_states))
        pipeline = Pipeline(stages)
        pipeline.prefill(prompts, (5, 0))
        tokens.append([pipeline.decode() for _ in range(3)])
    assert len(hidden_states) == 8
    assert_near(hidden_states[4], hidden_states[0], dtype)
    if dtype == torch.float32:
        assert tokens[0] == tokens[1]


def _keep(stage: Stage, kept: list[Tensor]) -> Any:
    def hook(*_: Any) -> None:
        assert stage._forward.hooks.outgoing is not None
        kept.append(stage._forward.hooks.outgoing[0])

    return hook


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_packed_weights_is_counted(
    tmp_path: Path, dtype: torch.dtype, pack_all: None
) -> None:
    model = load(make_checkpoint(tmp_path, hidden_size=128, intermediate_size=256), 1, 3, dtype)
    weights = (4 * 128 * 128 - 2 * 128 * 64 + 3 * 128 * 256) * 2  # by layer: q, o, k, v; mlp
    least = weights * dtype.itemsize + packed_alone(model)
    assert len(names_of_packed(model.model)) == 14
    assert least <= model.nbytes < 1.2 * least


def packed_alone(model: StageModel) -> int:
    """Return the bytes of what is not packed."""
    return sum(t.nbytes for t in (*model.model.parameters(), *model.model.buffers()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_tied_head_is_held_once(
    tmp_path: Path, family: str, dtype: torch.dtype, pack_all: None
) -> None:
    """With the embedding it stays as it is; alone on the last stage it is packed."""
    folder = make_checkpoint(tmp_path, family, tie=True)
    whole, last = load(folder, 0, 4, dtype), load(folder, 3, 4, dtype)
    assert "lm_head" not in names_of_packed(whole.model)
    assert "lm_head" in names_of_packed(last.model)
    embedding = cast(nn.Embedding, whole.model.get_input_embeddings())
    assert whole.model.get_parameter("lm_head.weight") is embedding.weight
    tables = [m.num_embeddings for m in last.model.modules() if isinstance(m, nn.Embedding)]
    assert VOCAB_SIZE not in tables


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_own_their_memory(
    tmp_path: Path, dtype: torch.dtype, pack_all: None
) -> None:
    """The file may change once they are packed."""
    folder = make_checkpoint(tmp_path)
    linear = cast(PackedLinear, load(folder, 0, 4, dtype).layers[2].get_submodule("mlp.up_proj"))
    states = torch.randn(3, linear.in_features).to(dtype)
    before = linear(states)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        size = path.stat().st_size
        file.seek(size // 4)
        file.write(b"\xff" * (size - size // 4))
    assert torch.equal(linear(states), before)


# ------------------------------------------------------------------ the switch


@pytest.fixture
def onednn() -> Iterator[Any]:
    """Return the switch, and see that it is back when the test ends."""
    switch = torch.backends.mkldnn
    if not switch.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch was built without oneDNN")
    yield switch
    assert switch.enabled


def test_one_token_is_computed_without_onednn(onednn: Any) -> None:
    with kernels_for(1):
        assert not onednn.enabled
    with kernels_for(2):
        assert onednn.enabled


def test_the_switch_is_back_after_an_error(onednn: Any) -> None:
    with pytest.raises(ZeroDivisionError), kernels_for(1):
        raise ZeroDivisionError


def test_a_kernel_that_nobody_knows_is_the_usual_one() -> None:
    """Choices are kept in a file, which another version may have written."""
    layer = RowLinear(nn.Linear(64, 64))
    states = torch.randn(2, 64)
    expected = layer(states)
    layer.use(["bogus"] * len(ROWS))
    assert torch.equal(layer(states), expected)
