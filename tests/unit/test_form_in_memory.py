"""What the weights of a model become in memory."""

import pytest

from distributed_llm.common.form_in_memory import bytes_in_memory, form_in_memory
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.weight_forms import INT8, Quantize, WeightForm

LAYER = "model.layers.3."


def stored(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> StoredWeight:
    part = TensorInfo(name, "f", dtype, shape, 0, 99)
    return StoredWeight(name, shape, {"": part})


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.experts.7.gate_proj.weight",
        "attn.c_proj.weight",
        "self_attn.q_a_proj.weight",
        "mlp.dense_h_to_4h.weight",
    ],
)
def test_matrices_of_linear_layers_become_integers(name: str) -> None:
    weight = stored(LAYER + name, (64, 128))
    assert form_in_memory(weight, in_layers=True, quantize="int8") == INT8
    assert form_in_memory(weight, in_layers=True, quantize="int4") == WeightForm(4, 64)
    assert form_in_memory(weight, in_layers=True, quantize="none") is None
    assert form_in_memory(weight, in_layers=False, quantize="int8") is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.gate.weight", (64, 128)),
        ("block_sparse_moe.router.layer.weight", (64, 128)),
        ("mlp.shared_expert_gate.weight", (64, 128)),
        ("mlp_hyper_connection.block_inject_weight.weight", (4, 8192)),
        ("ple.ple_embedding.ngram_embedding.shard_3.weight", (4096, 64)),
        ("linear_attn.conv1d.weight", (2048, 1, 4)),
        ("self_attn.q_norm.weight", (32, 128)),
        ("input_layernorm.weight", (4096,)),
        ("ln_1.weight", (64, 128)),
        ("mlp.experts.gate_up_proj_bias", (32, 128)),
        ("mlp.experts.3.down_proj.bias", (4096,)),
        ("linear_attn.A_log", (64, 64)),
        ("self_attn.q_proj.weight", (8, 16)),
        ("self_attn.gate_proj.weight", (1, 4096)),
    ],
)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_is_no_such_matrix_stays(
    name: str, shape: tuple[int, ...], quantize: Quantize
) -> None:
    assert form_in_memory(stored(LAYER + name, shape), in_layers=True, quantize=quantize) is None


def test_groups_divide_the_inputs() -> None:
    def int4(inputs: int) -> WeightForm | None:
        weight = stored(LAYER + "mlp.experts.down_proj", (4, 64, inputs))
        return form_in_memory(weight, in_layers=True, quantize="int4")

    assert [int4(96), int4(192), int4(80)] == [WeightForm(4, 32), WeightForm(4, 64), INT8]


def test_bytes() -> None:
    weight = stored(LAYER + "mlp.up_proj.weight", (64, 128))
    assert bytes_in_memory(weight, None, "float32") == 64 * 128 * 4
    assert bytes_in_memory(weight, INT8, "float32") == 64 * 128 + 64 * 6
    assert bytes_in_memory(weight, WeightForm(4, 64), "float32") == 64 * 64 + 64 * 2 * 8
    assert bytes_in_memory(weight, WeightForm(4, 64), "bfloat16") == 64 * 64 + 64 * 2 * 4
    large = stored(LAYER + "mlp.up_proj.weight", (512, 128))
    assert bytes_in_memory(large, INT8, "float32") == 512 * 128 + 512 * 4
    assert bytes_in_memory(large, WeightForm(4, 64), "float32") == 512 * 64 + 512 * 2 * 4
    assert bytes_in_memory(stored("position_ids", (512,), "I64"), None, "bfloat16") == 99


class Sixes:
    """Codes that int8 does not hold as they are."""

    label = "sixes"

    def form(self, shape: tuple[int, ...]) -> WeightForm:
        return INT8

    def is_exact(self, shape: tuple[int, ...]) -> bool:
        return False


def test_what_is_rounded_anyway_becomes_what_was_asked_for() -> None:
    weight = StoredWeight(LAYER + "mlp.up_proj.weight", (64, 128), {}, Sixes())
    assert form_in_memory(weight, in_layers=True, quantize="none") == INT8
    assert form_in_memory(weight, in_layers=True, quantize="int8") == INT8
    assert form_in_memory(weight, in_layers=True, quantize="int4") == WeightForm(4, 64)
    router = StoredWeight(LAYER + "mlp.gate.weight", (64, 128), {}, Sixes())
    assert form_in_memory(router, in_layers=True, quantize="int8") is None
    assert bytes_in_memory(router, None, "bfloat16") == 64 * 128 * 2
