"""Of models for text and pictures the text model is served; pictures cost nothing.

The reference is transformers' model as a whole, `generate` and forward with text alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distributed_llm.common.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.other_formats import QUANTIZATION_NAMES
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator import serve
from distributed_llm.coordinator.inspect_model import model_cost
from distributed_llm.weights.giving.library import Library
from distributed_llm.weights.giving.shelf import Shelf
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model.empty_model import parameters_of
from distributed_llm.worker.model.sampler import sample
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.model.driver import CPU, Pipeline, load_stages
from tests.quantized_checkpoints import make_quantized
from tests.reference import generated
from tests.wholes import WHOLES, build_phi4, build_whole, edit_config, rename_tensors

LENGTHS = (23, 3, 12)
CHUNKS = (5, 2, 4)
NEW_TOKENS = 6
NUM_LAYERS = 4
NO_TOKENS = as_token_ids(())


@pytest.fixture(scope="module", params=WHOLES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with names as in those on the hub."""
    path = tmp_path_factory.mktemp("whole")
    build_whole(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE - 1, (n,), generator=generator).tolist() for n in LENGTHS]


def text_parameters(whole: Any) -> int:
    """Return how many numbers the language model and its head have, tied ones once."""
    of_text = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in whole.state_dict().items()
        if any(part in name for part in ("language_model", "text_model", "lm_head"))
        and tensor.is_floating_point()
    }
    return sum(of_text.values())


def test_only_the_text_model_counts(folder: Path, checkpoint: Checkpoint, whole: Any) -> None:
    assert checkpoint.model_type == whole.config.text_config.model_type
    assert checkpoint.architecture == type(whole).__name__
    assert checkpoint.outer.ties_embeddings == whole.config.tie_word_embeddings
    assert checkpoint.num_parameters == text_parameters(whole)
    described = Checkpoint(folder, checkpoint.config, parameters_of(checkpoint.config))
    assert model_cost(described, "bfloat16") == model_cost(checkpoint, "bfloat16")


def test_tokens_equal_those_of_the_whole_model(
    checkpoint: Checkpoint, whole: Any, prompts: list[list[int]]
) -> None:
    expected = [generated(whole, prompt, NEW_TOKENS) for prompt in prompts]
    alone = checkpoint.model_type in FAMILIES  # then other splits are tested there
    for split in ([1, 1, 1, 1],) if alone else ([4], [1, 3], [2, 1, 1], [1, 1, 1, 1]):
        pipeline = Pipeline(load_stages(checkpoint, split))
        pipeline.prefill(prompts, [len(prompt) - 1 for prompt in prompts])
        assert [pipeline.decode() for _ in range(NEW_TOKENS)] == list(
            map(list, zip(*expected, strict=True))
        )
    assert len({token for tokens in expected for token in tokens}) > 2
    planned = checkpoint.layer_kv_bytes("float32")
    assert tuple(stage.kv_bytes_per_token for stage in pipeline.stages) == planned


def test_chunks_of_prompts_give_the_whole_forward(
    checkpoint: Checkpoint, whole: Any, prompts: list[list[int]]
) -> None:
    pipeline = Pipeline(load_stages(checkpoint, [1, 3]))
    # Which transformers' class for the whole model leaves out.
    scale = getattr(whole.config.text_config, "logit_scale", 1.0)
    with torch.inference_mode():
        logits = [
            scale * whole(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            for prompt in prompts
        ]
    while chunks := pipeline.next_chunks(prompts, CHUNKS):
        rows = torch.stack([logits[sequence][stop - 1] for sequence, _, stop in chunks])
        stops = [stop for _, _, stop in chunks]
        for sampling in (Sampling(), Sampling(temperature=2.0, seed=1)):
            expected = sample(rows, [sampling] * len(rows), stops, [NO_TOKENS] * len(rows))
            assert pipeline.run(chunks, sampling) == expected.tolist()


def test_pictures_are_neither_read_nor_compared(folder: Path, tmp_path: Path) -> None:
    """Another model for pictures beside the same text model is the same model."""
    path = folder / "model.safetensors"
    layers = LayerRange(0, NUM_LAYERS)
    before = open_checkpoint(folder)
    tensors = load_file(path)
    others = tensors.keys() - before.tensors.keys()
    assert others
    shorter = {n: t if n not in others else t.flatten()[:1] for n, t in tensors.items()}
    save_file(shorter, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    after = open_checkpoint(tmp_path)
    Stage.check_loading(after)
    prints = [one.fingerprints(layers, sampled=True) for one in (before, after)]
    assert before.digest(layers, prints[0]) == after.digest(layers, prints[1])
    source = ModelSource(kind="folder", name=str(folder))
    library = Library(source, before, lambda name, _: folder / name, Shelf(), tmp_path / "digests")
    told = library.description
    assert {one.name for one in told.tensors} == before.tensors.keys()
    again = checkpoint_of(tmp_path, json.loads(told.config), before.tensors)
    assert again.digest(layers, prints[0]) == before.digest(layers, prints[0])


def tokens_of(folder: Path, prompt: list[int]) -> list[int]:
    checkpoint = open_checkpoint(folder)
    layers = LayerRange(0, checkpoint.num_layers)
    stage = Stage.load(checkpoint, layers, device=CPU, dtype=torch.float32)
    pipeline = Pipeline([stage])
    pipeline.prefill([prompt], [0])
    return [pipeline.decode()[0] for _ in range(NEW_TOKENS)]


def as_saved_today(folder: Path) -> None:
    """Have the names that transformers' models of today have themselves."""
    rename_tensors(
        folder,
        lambda name: (
            name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head.", "lm_head."
            )
            if "language_model.model." in name or "lm_head" in name
            else f"model.{name}"
        ),
    )


def as_qwen2_on_the_hub(folder: Path) -> None:
    """Have all values of the text model beside those of the whole, as in files of 2024."""
    edit_config(
        folder,
        lambda config: {
            **config.pop("text_config"),
            **config,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "rope_theta": 1e4,
        },
    )


def with_experts_as_on_the_hub(folder: Path) -> None:
    """Have the matrices of experts lie the other way round."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    experts = {name for name in tensors if ".mlp.experts." in name}
    assert len(experts) == 2 * NUM_LAYERS
    turned = {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
    save_file(tensors | turned, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("gemma3", as_saved_today),
        ("qwen2_5_vl", as_qwen2_on_the_hub),
        ("qwen3_vl_moe", with_experts_as_on_the_hub),
    ],
)
def test_other_forms_of_the_same_checkpoint(model_type: str, change: Any, tmp_path: Path) -> None:
    whole = build_whole(model_type)
    whole.save_pretrained(tmp_path)
    before = set(open_checkpoint(tmp_path).tensors)
    change(tmp_path)
    prompt = list(range(3, 20))
    assert tokens_of(tmp_path, prompt) == generated(whole, prompt, NEW_TOKENS)
    if change is as_saved_today:
        assert before.isdisjoint(open_checkpoint(tmp_path).tensors)


def test_the_text_model_of_phi_4_is_a_phi_3(tmp_path: Path) -> None:
    whole = build_phi4()
    whole.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_type == "phi3"
    assert not [name for name in checkpoint.tensors if "extend" in name]
    prompt = list(range(3, 20))
    assert tokens_of(tmp_path, prompt) == generated(whole, prompt, NEW_TOKENS)


def test_the_text_model_of_gemma_3n(tmp_path: Path) -> None:
    """Of the whole, transformers needs a package for pictures; its files name tensors like this."""
    make_checkpoint(tmp_path, "gemma3n_text")
    text: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rename_tensors(tmp_path, lambda name: name.replace("model.", "model.language_model.", 1))
    edit_config(tmp_path, lambda config: {"model_type": "gemma3n", "text_config": config})
    assert open_checkpoint(tmp_path).model_type == "gemma3n_text"
    prompt = list(range(3, 20))
    assert tokens_of(tmp_path, prompt) == generated(text, prompt, NEW_TOKENS)


def test_kimi_k2_is_a_deepseek_v3_under_a_name_of_its_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", num_layers=2)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    code = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    edit_config(tmp_path, lambda config: {**config, "model_type": "kimi_k2", "auto_map": code})
    planned = serve.plan(
        *(str(tmp_path), ["pc=1GiB"], CoordinatorSettings()),
        parameters_of=parameters_of,
        check_loading=Stage.check_loading,
    )
    assert planned.plans
    prompt = list(range(3, 20))
    assert tokens_of(tmp_path, prompt) == generated(model, prompt, NEW_TOKENS)


@pytest.mark.parametrize("kind", ["gptq", "fp8", "mlx"])
def test_a_quantized_text_model(kind: str, tmp_path: Path) -> None:
    """As it is: what is said about the whole counts for it, whatever pictures are kept as."""
    quantized, plain = make_quantized(tmp_path, kind)
    path = quantized / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["vision_tower.layers.0.weight"] = torch.zeros(2, 2, dtype=torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})

    def as_whole(config: dict[str, Any]) -> dict[str, Any]:
        of_whole = {name: config.pop(name) for name in QUANTIZATION_NAMES if name in config}
        assert of_whole
        return {"model_type": "llava", "text_config": config, "vision_config": {}, **of_whole}

    edit_config(quantized, as_whole)
    prompt = list(range(3, 20))
    assert tokens_of(quantized, prompt) == tokens_of(plain, prompt)
