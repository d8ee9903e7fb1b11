"""Layers that embed n-grams: what they make of tokens, and how their table is planned and loaded.

`test_families` holds the tokens of such models against transformers.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distributed_llm.common.architectures import why_refused
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.ngrams import ngram_layers, ngram_windows, table_part
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.text_config import text_config
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.worker.model.away_layers import away_nbytes
from distributed_llm.worker.model.incoming import Entry, Floats, Piece, WeightReader
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import VOCAB_SIZE, build_model, make_checkpoint
from tests.model.driver import CPU, Pipeline

SETTINGS: dict[str, Any] = {
    **{"num_layers": 3, "ple_layer_ids": [1, 3], "ngram_size": 4},
    "ngram_vocab_size_base": 1000,
}
END = 5
"""The token that ends a text in this model: n-grams do not reach beyond it."""
TEXT = torch.randint(VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(5)).tolist()
TEXT[7] = TEXT[8] = TEXT[13] = TEXT[20] = END


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ngrams"), "qwen4_exp_text", **SETTINGS)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What transformers makes of TEXT in all layers."""
    whole = build_model("qwen4_exp_text", **SETTINGS)
    kept = outputs_of_last_layer(whole)
    with torch.inference_mode():
        whole(input_ids=torch.tensor([TEXT]), use_cache=False)
    return kept[0]


def outputs_of_last_layer(model: Any) -> list[Tensor]:
    """Return a list that what the last layer gives is added to, [tokens, streams * hidden_size]."""
    kept: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda *given: kept.append(given[2][0]))
    return kept


def answer(stage: Stage) -> list[int]:
    pipeline = Pipeline([stage])
    pipeline.prefill([TEXT], [len(TEXT) - 1])
    return [pipeline.decode()[0] for _ in range(4)]


def load(checkpoint: Checkpoint, start: int, stop: int, **settings: Any) -> Stage:
    layers = LayerRange(start, stop)
    return Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32, **settings)


@pytest.mark.parametrize("stops", [(30,), (1, 2, 3, 5, 8, 9, 10, 13, 14, 21, 23, 30)])
def test_ngrams_reach_over_steps_and_end_with_texts(
    checkpoint: Checkpoint, expected: Tensor, stops: tuple[int, ...]
) -> None:
    """On a stage that does not embed tokens as on the first one; at once, and in short steps."""
    stages = [load(checkpoint, 0, 2), load(checkpoint, 2, 3)]
    kept, start = outputs_of_last_layer(stages[1]._held.model), 0
    for stop in stops:
        part = SequenceSlice(sequence_id=SequenceId(0), start=start, num_tokens=stop - start)
        token_ids, states = torch.tensor(TEXT[start:stop], dtype=torch.int32), None
        for stage in stages:
            states = stage.run([part], token_ids, states).hidden_states
        start = stop
    torch.testing.assert_close(torch.cat(kept), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_table_is_planned_and_held_where_its_layer_is(
    checkpoint: Checkpoint, quantize: Quantize
) -> None:
    cost = model_cost(checkpoint, "float32", quantize)
    for start, stop in ((0, 1), (1, 3)):
        stage = load(checkpoint, start, stop, quantize=quantize)
        planned = cost.weight_bytes(LayerRange(start, stop))
        beside = 0.01 if quantize == "none" else 0.02  # rotary frequencies, sums of integers
        assert 0 <= stage.weight_bytes - planned <= beside * planned
        tables = [m for m in stage._held.layers.modules() if isinstance(m, nn.Embedding)]
        held = sum([table.weight.nbytes for table in tables])
        assert held == sum(cost.table_bytes[start:stop])
    assert cost.table_bytes[0] > cost.table_bytes[1] == 0


def test_a_table_stays_in_memory_when_its_layer_is_on_the_disk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))
    stage = load(checkpoint, 0, 3, from_disk=3)
    cost = model_cost(checkpoint, "float32")
    small = [p.nbytes for p in stage._held.layers.parameters() if p.nbytes < 4096]
    assert sum(cost.sizes_away(range(3))) == away_nbytes(stage._held.layers) + sum(small)
    assert answer(stage) == answer(load(checkpoint, 0, 3))


@pytest.mark.parametrize("whole", [False, True])
def test_files_need_not_have_what_follows_from_the_configuration(
    folder: Path, tmp_path: Path, whole: bool
) -> None:
    """And may hold a table as one tensor."""
    tensors = load_file(folder / "model.safetensors")
    derived = [name for name, tensor in tensors.items() if tensor.dtype == torch.int64]
    assert len(derived) == 6
    for name in derived:
        del tensors[name]
    if whole:
        parts = {name: place for name in tensors if (place := table_part(name))}
        for table in {table for table, _ in parts.values()}:
            own = sorted((n for n in parts if parts[n][0] == table), key=lambda n: parts[n][1])
            assert len(own) == 3
            tensors[table] = torch.cat([tensors.pop(name) for name in own])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    found = load(open_checkpoint(tmp_path), 0, 3)
    wanted = load(open_checkpoint(folder), 0, 3)
    assert found.weight_bytes == wanted.weight_bytes
    assert answer(found) == answer(wanted)


def test_files_that_lack_a_part_of_a_table_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.ple.ple_embedding.ngram_embedding.shard_1.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    wrong = r"layer 2: tensor model.layers.2.ple.ple_embedding.ngram_embedding.weight has shape"
    with pytest.raises(CheckpointError, match=wrong):
        load(checkpoint, 2, 3)
    with pytest.raises(CheckpointError, match=wrong):
        Stage.check_loading(checkpoint)


def test_parts_of_a_table_in_8_bits_have_a_scale_in_common(folder: Path, tmp_path: Path) -> None:
    """As in files in which experts and the table are FP8."""
    tensors = load_file(folder / "model.safetensors")
    scale, wanted = torch.tensor([0.0625], dtype=torch.bfloat16), []
    for layer in (0, 2):
        table = f"model.layers.{layer}.ple.ple_embedding.ngram_embedding"
        names = [f"{table}.shard_{part}.weight" for part in range(3)]
        for name in names:
            tensors[name] = (tensors[name] / scale.float()).to(torch.float8_e4m3fn)
        tensors[f"{table}.weight_scale"] = scale.clone()
        wanted.append(torch.cat([tensors[name].float() for name in names]) * scale.float())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    stage = load(checkpoint, 0, 3)
    found = [m.weight for m in stage._held.layers.modules() if isinstance(m, nn.Embedding)]
    for actual, expected in zip(found, wanted, strict=True):
        assert torch.equal(actual, expected)
    cost = model_cost(checkpoint, "float32")
    assert sum(cost.table_bytes) == sum(table.nbytes for table in found)
    scales = [t.name for t in checkpoint.tensors_of(LayerRange(0, 3)) if "weight_scale" in t.name]
    assert len(scales) == 2


class Reader(WeightReader):
    """Returns rows that are numbered, and notes how many tensors of it exist at a time."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = self.read_rows = 0

    def plain(self, weight: StoredWeight) -> Tensor:
        numbers = torch.arange(self.read_rows, self.read_rows + weight.shape[0])[:, None]
        self.read_rows += weight.shape[0]
        made: Tensor = numbers.repeat(1, weight.shape[1]).to(torch.bfloat16)
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


def test_parts_of_a_table_are_read_one_after_the_other() -> None:
    shapes = [(rows, 4) for rows in (3, 3, 3, 3, 3, 2)]
    infos = [TensorInfo(str(n), "", "BF16", shape, 0, 0) for n, shape in enumerate(shapes)]
    weights = [StoredWeight(info.name, info.shape, {"": info}) for info in infos]
    reader = Reader()
    entry = Entry("table", tuple(map(Piece, weights)))
    found = Floats(reader, entry, torch.float32, transposed=False)[...]
    assert found.dtype == torch.float32
    assert found.tolist() == [[row] * 4 for row in range(17)]
    assert reader.most <= 2


def test_windows_are_of_the_layers_that_embed_ngrams() -> None:
    config = {
        **{"model_type": "qwen4_exp_text", "hidden_size": 8, "ple_layer_ids": [2]},
        **{"hc_count": 3, "ple_conv_kernel_size": 4, "ngram_size": 2},
    }
    assert ngram_layers(config) == {1}
    assert ngram_windows(config, 3) == (0, 3 * 8 * 3 * 2, 0)
    assert ngram_windows({**config, "model_type": "qwen3_next"}, 3) == (0, 0, 0)
    for name, value in (("ple_layer_ids", [True]), ("hc_count", 0), ("ngram_size", "two")):
        with pytest.raises(CheckpointError, match=f"{name} = "):
            ngram_windows({**config, name: value}, 3)


def test_a_convolution_of_one_token_is_refused(checkpoint: Checkpoint) -> None:
    told = {**checkpoint.config, "ple_conv_kernel_size": 1}
    assert "with which transformers does not generate" in str(why_refused(told))
    assert why_refused({**told, "ple_layer_ids": []}) is None


def test_the_end_of_texts_is_that_of_the_text_model() -> None:
    """N-grams are made with it; what ends an answer is in the generation configuration as well."""
    config: dict[str, Any] = {"model_type": "qwen4_exp", "eos_token_id": 7, "text_config": {}}
    assert text_config(config)["eos_token_id"] == 7
    config["text_config"] = {"eos_token_id": 3}
    assert text_config(config)["eos_token_id"] == 3
