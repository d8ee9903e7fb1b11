"""How many threads a stage computes with."""

from pathlib import Path

import msgspec
import pytest

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.messages import LoadStage, ModelSource
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.worker.compute.loading import num_threads

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 9}


def order(layers: LayerRange) -> LoadStage:
    return LoadStage(
        epoch=Epoch(1),
        source=ModelSource(kind="builtin", name=""),
        layers=layers,
        dtype="float32",
        wire_dtype="float32",
        digest="d",
        kv_tokens=1000,
        link_key="k",
    )


def checkpoint(**rows: int) -> Checkpoint:
    """Return one whose matrices have 1024 columns and so many rows; __ stands for a dot."""
    tensors = {}
    for name, count in rows.items():
        info = TensorInfo(f"{name.replace('__', '.')}.weight", "f", "F32", (count, 1024), 0, 0)
        tensors[info.name] = info
    return Checkpoint(Path("nowhere"), CONFIG, tensors)


SMALL = {
    "model__embed_tokens": 100_000,  # is not multiplied with
    "model__layers__0__mlp__up_proj": 511,
    "model__layers__1__mlp__up_proj": 511,
    "lm_head": 511,
}


@pytest.mark.parametrize(
    ("large", "layers", "threads"),
    [
        ("", LayerRange(0, 2), 1),
        ("model__layers__0__mlp__up_proj", LayerRange(0, 2), 8),
        ("model__layers__0__mlp__up_proj", LayerRange(0, 1), 8),
        ("model__layers__0__mlp__up_proj", LayerRange(1, 2), 1),
        ("lm_head", LayerRange(1, 2), 8),
        ("lm_head", LayerRange(0, 1), 1),
    ],
)
def test_small_matrices_are_not_worth_several_threads(
    large: str, layers: LayerRange, threads: int
) -> None:
    rows = SMALL | ({large: 512} if large else {})
    assert num_threads(checkpoint(**rows), order(layers), 8) == threads


def test_it_is_the_size_in_memory_that_counts() -> None:
    rows = SMALL | {"model__layers__0__mlp__up_proj": 512}
    asked = order(LayerRange(0, 2))
    assert num_threads(checkpoint(**rows), asked, 8) == 8
    narrow = msgspec.structs.replace(asked, dtype="bfloat16")
    assert num_threads(checkpoint(**rows), narrow, 8) == 1
