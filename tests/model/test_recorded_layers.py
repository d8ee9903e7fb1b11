"""Steps that were recorded compute what the model's own code does, to the last bit."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.model import layer_program, recorded_layers
from distributed_llm.worker.model.element_operations import elements_of, new_operation
from distributed_llm.worker.model.experts import PackedExperts
from distributed_llm.worker.model.kernels import chosen, native
from distributed_llm.worker.model.kernels.native.attention import places_of
from distributed_llm.worker.model.kernels.native.replay import Operations
from distributed_llm.worker.model.recorded_layers import Kept
from distributed_llm.worker.model.recording import Recording, TorchCall
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint
from tests.model.driver import CPU, Pipeline

pytestmark = pytest.mark.skipif(
    native.instructions() == "none", reason="the C library was not built here"
)

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 18], [1, 8, 28, 18, 28])

FAMILIES = ("llama", "gpt2", "phi3", "gemma3_text", "glm4", "cohere", "gpt_neox")
"""Among them: other norms, fused and interleaved projections, windows, biases, float32 inside."""

OF_STATES = (
    *("qwen3_5_text", "falcon_h1", "mamba", "lfm2"),
    *("bailing_hybrid", "zamba", "recurrent_gemma"),
)
"""Whose states the C library computes in all ways that it has; the last three's are torch's."""


def stage_of(folder: Path, **options: Any) -> Stage:
    checkpoint = open_checkpoint(folder)
    layers = LayerRange(0, checkpoint.num_layers)
    return Stage.load_unchecked(
        checkpoint, layers, device=CPU, dtype=options.pop("dtype", torch.bfloat16), **options
    )


def layers_of(stage: Stage) -> list[Any]:
    return list(stage._held.layers)


def unrecorded(stage: Stage) -> Stage:
    """Have the model's own code compute every step."""
    for layer in layers_of(stage):
        del layer.forward
    return stage


def states_of(stage: Stage, *, steps: int = 6) -> Iterator[list[Tensor]]:
    """Read prompts and decode; yield what the layers return in each step, and the tokens."""
    seen: list[Tensor] = []
    for layer in layers_of(stage):
        layer.register_forward_hook(
            lambda _layer, _args, output: seen.append(
                (output[0] if isinstance(output, tuple) else output).clone()
            )
        )
    pipeline = Pipeline([stage])
    pipeline.texts = [list(prompt) for prompt in PROMPTS]
    pipeline.done = [0] * len(PROMPTS)
    running = range(len(PROMPTS))
    for step in range(steps):
        chunks = [
            (number, pipeline.done[number], len(pipeline.texts[number])) for number in running
        ]
        for number, token in zip(running, pipeline.run(chunks), strict=True):
            pipeline.texts[number].append(token)
        yield [*seen, torch.tensor(pipeline.texts[0])]
        seen.clear()
        running = range(1 + step % 3)  # numbers of rows come and go


def programs_of(stage: Stage) -> list[set[int]]:
    return [set(layer.forward._programs) for layer in layers_of(stage)]


@pytest.mark.parametrize("family", FAMILIES + OF_STATES)
def test_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, num_layers=2)
    stage = stage_of(folder)
    expected = list(states_of(unrecorded(stage_of(folder))))
    for own, recorded in zip(expected, states_of(stage), strict=True):
        assert all(map(torch.equal, own, recorded))
    of_latents = family == "bailing_hybrid"  # which look at their numbers
    assert programs_of(stage) == [{1, 2, 3}, set() if of_latents else {1, 2, 3}]


def test_texts_that_begin_beside_others_are_not_recorded(tmp_path: Path) -> None:
    """They have no state yet to go on from; and what others have may lie in several places."""
    folder = make_checkpoint(tmp_path, "qwen3_5_text", num_layers=1)
    stages = [stage_of(folder), unrecorded(stage_of(folder))]
    for step in ([(0, 0, 3)], [(1, 0, 1)], [(0, 3, 4), (1, 1, 2)], [(2, 0, 1), (0, 4, 5)]):
        tokens = []
        for stage in stages:
            pipeline = Pipeline([stage])
            pipeline.texts, pipeline.done = [[3, 1, 4, 1, 5], [9, 2], [6]], [0] * 3
            tokens.append(pipeline.run(step))
        assert tokens[0] == tokens[1]
    assert programs_of(stages[0]) == [{2}]


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"quantize": "int4", "kv_dtype": "int8"}]
)
def test_integers_are_computed_in_one_call(options: dict[str, Any], tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    folder = make_checkpoint(
        tmp_path, "qwen2", num_layers=1, **sizes, head_dim=64, num_key_value_heads=4
    )
    stage = stage_of(folder, **options)
    expected = list(states_of(unrecorded(stage_of(folder, **options))))
    for own, recorded in zip(expected, states_of(stage), strict=True):
        assert all(map(torch.equal, own, recorded))
    (layer,) = layers_of(stage)
    assert len(layer.forward._programs[1].program._steps_in_calls) == 1


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_layers_with_experts_compute_what_these_do_one_by_one(
    family: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; integers with a bias are the one thing that the library does not take."""
    monkeypatch.setattr(chosen, "SMALLEST", 1)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 64}
    if family == "glm4_moe":  # of which the first layer has no experts
        sizes |= {"moe_intermediate_size": 64, "first_k_dense_replace": 0}
    folder = make_checkpoint(tmp_path, family, num_layers=1, **sizes)
    stage = stage_of(folder, quantize=quantize)
    monkeypatch.setattr(PackedExperts, "_of_library", lambda _: None)
    expected = list(states_of(unrecorded(stage_of(folder, quantize=quantize))))
    monkeypatch.undo()
    for own, recorded in zip(expected, states_of(stage), strict=True):
        assert all(map(torch.equal, own, recorded))
    taken = quantize == "none" or family != "gpt_oss"
    assert programs_of(stage) == [{1, 2, 3} if taken else set()]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_attention_over_latents_is_recorded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "SMALLEST", 1)
    sizes: Any = {
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    folder = make_checkpoint(
        tmp_path, family, num_layers=2, hidden_size=64, moe_intermediate_size=64, **sizes
    )
    stage = stage_of(folder)
    expected = list(states_of(unrecorded(stage_of(folder))))
    for own, recorded in zip(expected, states_of(stage), strict=True):
        assert all(map(torch.equal, own, recorded))
    assert programs_of(stage) == [{1, 2, 3}] * 2


def test_a_step_with_other_arguments_is_the_models_own(tmp_path: Path) -> None:
    stage = stage_of(make_checkpoint(tmp_path, num_layers=1))
    (layer,) = layers_of(stage)
    program = layer.forward._programs[1]
    states = torch.zeros(1, 1, 64).bfloat16()
    assert program.run(None, {}, (states,), {"new": True}) is None


OTHERS = torch.ones(1).bfloat16()
"""A tensor that is neither given to a layer nor its own."""


class Changed(nn.Module):
    """A layer around another one, which does something that cannot be recorded."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.layer(self.change(hidden_states), **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        lambda states: states * float(states.max()),
        lambda states: states.add_(1),
        lambda states: states + OTHERS,
        lambda states: states + states.new_zeros(1),
        lambda states: states[states != 0].view(states.shape),
    ],
)
def test_what_looks_at_numbers_or_changes_them_is_not_recorded(
    change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    stage = unrecorded(stage_of(make_checkpoint(tmp_path, num_layers=1)))
    layers = nn.ModuleList([Changed(layers_of(stage)[0], change)])
    recorded_layers.record_layers(layers, [Kept(True, False)], CPU, torch.bfloat16)
    stage._forward._model.model.layers = layers
    for _ in states_of(stage, steps=4):
        pass
    recorded: Any = layers[0].forward
    assert not recorded._programs
    assert not recorded._recordable


def test_a_program_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(call: TorchCall) -> Any:
        found = elements_of(call)
        if call.function is torch.ops.aten.silu.default and found:
            return [each._replace(table=torch.zeros(1 << 16).bfloat16()) for each in found]
        return found

    monkeypatch.setattr("distributed_llm.worker.model.layer_program.elements_of", wrong)
    stage = stage_of(make_checkpoint(tmp_path, num_layers=1))
    assert programs_of(stage) == [set()]


def test_large_states_that_torch_makes_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be in memory several times; the C library leaves them where they are."""
    monkeypatch.setattr(layer_program, "_MOST_COPIED", 1 << 10)
    recorded: dict[str, set[int]] = {"zamba": set(), "mamba2": {1, 2, 3}}
    for family, rows in recorded.items():
        stage = stage_of(make_checkpoint(tmp_path / family, family, num_layers=2))
        for _ in states_of(stage, steps=4):
            pass
        assert programs_of(stage) == [rows] * 2


def test_states_that_are_no_numbers_do_not_end_recording(tmp_path: Path) -> None:
    stage = stage_of(make_checkpoint(tmp_path, num_layers=1))
    (layer,) = layers_of(stage)
    layer.forward._programs.clear()
    weight = layer.input_layernorm.weight
    right = weight.clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(Exception, match="not finite"):
        Pipeline.run(one_text(stage), [(0, 0, 1)])
    assert programs_of(stage) == [set()]
    weight.data.copy_(right)
    Pipeline.run(one_text(stage), [(0, 0, 1)])
    assert programs_of(stage) == [{1}]


def one_text(stage: Stage) -> Pipeline:
    stage.reset()
    pipeline = Pipeline([stage])
    pipeline.texts, pipeline.done = [[3]], [0]
    return pipeline


def test_float32_and_many_rows_are_not_recorded(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    assert "forward" not in vars(layers_of(stage_of(folder, dtype=torch.float32))[0])
    stage = stage_of(folder)
    pipeline = Pipeline([stage])
    pipeline.texts, pipeline.done = [[number] for number in range(17)], [0] * 17
    pipeline.run([(number, 0, 1) for number in range(17)])
    assert programs_of(stage) == [{1}]


def test_stages_that_share_a_layer_record_it_by_themselves(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1)
    donor = stage_of(folder)
    stage = stage_of(folder, donor=donor)
    own, theirs = layers_of(stage)[0], layers_of(donor)[0]
    assert own.forward is not theirs.forward
    assert own.mlp is theirs.mlp
    expected = list(states_of(donor))
    gone = weakref.ref(theirs)
    gc.disable()
    try:
        del donor, theirs
        assert gone() is None
    finally:
        gc.enable()
    for before, after in zip(expected, states_of(stage), strict=True):
        assert all(map(torch.equal, before, after))


def test_what_was_made_may_be_changed_and_two_tensors_be_made() -> None:
    states = torch.randn(2, 8).bfloat16()
    with torch.inference_mode(), Recording() as recording:
        values, places = states.topk(3)
        values /= values.sum(dim=-1, keepdim=True)
    assert recording.failure is None
    first = recording.calls[0]
    assert isinstance(first, TorchCall)
    assert first.output is values
    assert first.others[0] is places
    with torch.inference_mode(), recording:
        states /= 2
    assert recording.failure == "it calls aten.div_.Tensor"


OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x + x.flip(0),
    "row": lambda x: x * x[:1],
    "row first": lambda x: x[0, :, :1] + x,
    "column": lambda x: x[..., :1] * x,
    "views": lambda x: x.transpose(0, 1)[:, 1:, ::2] * x[1:].transpose(0, 1)[..., ::2],
    "number": lambda x: (x * 0.3, x + 0.1, x * -3),
    "single": lambda x: x * x[0, 0, 0],
    "negated": lambda x: -x[..., 2:],
    "joined": lambda x: torch.cat((x[..., 5:], -x[..., :5]), -1),
    "joined along the first": lambda x: torch.cat((x, x[:0], x[1:])),
    "copied": lambda x: (x.transpose(0, 2).contiguous(), x.transpose(0, 1).reshape(-1)),
    "repeated": lambda x: x[0].repeat(3, 1),
    "looked up": lambda x: (F.silu(x), F.gelu(x), x**2, x.tanh()),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("width", [3, 41, 9000])
def test_elements_are_those_of_torch(name: str, width: int) -> None:
    torch.manual_seed(0)
    states = (torch.randn(3, 4, width) * 3).bfloat16()
    states[0, 0, :3] = torch.tensor([3e4, 0.0, -1e-30])
    recording = Recording()
    with torch.inference_mode(), recording:
        OPERATIONS[name](states)
    with torch.inference_mode():
        check(recording)


def check(recording: Recording) -> None:
    calls = [call for call in recording.calls if isinstance(call, TorchCall)]
    done = 0
    for call in calls:
        expected = call.output.clone()
        call.output.fill_(7.0)
        for kind, output, first, second, table in elements_of(call) or ():
            operation = new_operation(kind, output, first, second)
            operation.output, operation.first = output.data_ptr(), first.data_ptr()
            if isinstance(second, Tensor):
                operation.second = second.data_ptr()
            if table is not None:
                operation.places[0] = table.data_ptr()
            Operations([operation]).run(0, places_of([]))
            done += 1
        assert torch.equal(call.output.view(torch.int16), expected.view(torch.int16))
    assert done >= len(calls) > 0
