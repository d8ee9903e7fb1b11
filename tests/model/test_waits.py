"""How often a step waits for its device; counted on torch's device without numbers, `meta`.

There a value cannot be read: whatever would wait for a GPU raises, but for what is counted here.
A tensor that is sent to a GPU waits too, unless it is said not to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker import devices
from distributed_llm.worker.model import latents, page_attention
from distributed_llm.worker.model.kernels import packed_nbytes, varlen
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.tensor_frames import frame_of
from tests.checkpoints import make_checkpoint
from tests.made_up_gpus import GPUS

META = torch.device("meta")

PREFILL = [(0, 5), (0, 9)]
MIXED = [(5, 1), (9, 1), (0, 7)]
DECODE = [(6, 1), (10, 1), (7, 1)]
"""First position and number of tokens of each sequence in steps that follow one another."""


class Waits(TorchFunctionMode):
    """Counts copies to and from the device and conditions on its values; the last two give ones."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        given = [str(one) for one in (*args[1:], *kwargs.values()) if not isinstance(one, Tensor)]
        if not isinstance(tensor, Tensor) or tensor.device != META:
            makes = func in (torch.tensor, torch.as_tensor, Tensor.to)
            if makes and str(META) in given and not kwargs.get("non_blocking"):
                self.names.append("send")
            return func(*args, **kwargs)
        if func is Tensor.__bool__:
            self.names.append("bool")
            return True
        to_cpu = func is Tensor.cpu or (func is Tensor.to and "cpu" in given)
        if not to_cpu:
            return func(*args, **kwargs)
        self.names.append("copy")
        return func(torch.ones(tensor.shape, dtype=tensor.dtype), *args[1:], **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("llama")
    return open_checkpoint(make_checkpoint(folder, num_layers=3))


def waits_of(stage: Stage, parts: Sequence[tuple[int, int]], hidden_size: int) -> list[str]:
    """Run a step and make frames of its result, as a worker does; return what waited."""
    sequences = [
        SequenceSlice(
            sequence_id=SequenceId(number),
            start=start,
            num_tokens=count,
            sample=True,
            sampling=Sampling(),
        )
        for number, (start, count) in enumerate(parts)
    ]
    tokens = sum(count for _, count in parts)
    first = stage.layers.start == 0
    states = None if first else torch.ones(tokens, hidden_size, dtype=torch.bfloat16)
    waits = Waits()
    with waits:
        output = stage.run(sequences, torch.ones(tokens, dtype=torch.int32), states)
        for tensor in (output.hidden_states, output.token_ids):
            if tensor is not None:
                frame_of(tensor)
    return waits.names


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(0, ["copy"], id="first"),
        pytest.param(1, ["copy"], id="middle"),
        pytest.param(2, ["bool", "copy"], id="last"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_waits_once_but_on_the_last_stage(
    checkpoint: Checkpoint, layer: int, expected: list[str], dtype: torch.dtype
) -> None:
    """The last stage looks whether its logits are finite, then takes its tokens."""
    stage = Stage.load(checkpoint, LayerRange(layer, layer + 1), device=META, dtype=dtype)
    for parts in (PREFILL, MIXED, DECODE):
        assert waits_of(stage, parts, checkpoint.hidden_size) == expected


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        pytest.param("deepseek_v2", torch.float32, {"first_k_dense_replace": 3}, id="latents"),
        pytest.param("bloom", torch.bfloat16, {}, id="bloom"),
        pytest.param("falcon", torch.bfloat16, {"alibi": True, "multi_query": False}, id="falcon"),
        pytest.param("mpt", torch.bfloat16, {}, id="mpt"),
    ],
)
def test_attention_of_other_kinds_waits_no_more_often(
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 16 bits, attention to latents also looks whether its scores are rounded too much."""
    monkeypatch.setattr(latents, "_is_alike", lambda *_: True)  # reads values as a stage is loaded
    other = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=3, **settings))
    stage = Stage.load(other, LayerRange(1, 2), device=META, dtype=dtype)
    for parts in (PREFILL, MIXED, DECODE):
        assert waits_of(stage, parts, other.hidden_size) == ["copy"]


def test_products_with_integers_wait_for_nothing(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    made = open_checkpoint(make_checkpoint(tmp_path, num_layers=3, **sizes))
    middle = LayerRange(1, 2)
    stage = Stage.load(made, middle, device=META, dtype=torch.bfloat16, quantize="int4")
    assert packed_nbytes(stage._held.layers) > 0
    for parts in (PREFILL, MIXED, DECODE):
        assert waits_of(stage, parts, made.hidden_size) == ["copy"]


def test_attention_over_pages_waits_for_nothing_and_sends_its_tables_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each kind of layers: here those with a window, and those without."""
    monkeypatch.setattr(varlen, "facts_of", lambda device: GPUS["cuda"])
    monkeypatch.setattr(varlen, "_problem", lambda *_: "")
    monkeypatch.setattr(varlen, "_right", {})
    made = open_checkpoint(make_checkpoint(tmp_path, "gpt_oss", num_layers=4))
    stage = Stage.load(made, LayerRange(1, 3), device=META, dtype=torch.bfloat16)
    assert stage._cache.pages
    assert set(stage._cache.windows) > {0}
    sent: list[Tensor] = []

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor)
        return devices.sent(tensor, device)

    monkeypatch.setattr(page_attention, "sent", counted)
    for parts in (PREFILL, MIXED, DECODE):
        sent.clear()
        assert waits_of(stage, parts, made.hidden_size) == ["copy"]
    assert len(sent) == 2


# ------------------------------------------------------------------ memory that is pinned


def test_a_gpu_reads_what_it_is_sent_out_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    tensor = torch.ones(2)
    assert devices.sent(tensor, META).device == META
    assert not pinned, "no GPU"
    monkeypatch.setattr(devices, "_backend", lambda device: torch.cuda)
    assert devices.sent(tensor, META).device == META
    assert devices.sent(tensor, torch.device("cpu")) is tensor
    assert pinned == [tensor]


def test_a_gpu_writes_results_into_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Pinned:
        def copy_(self, tensor: Tensor) -> str:
            made.append(tensor)
            return "there"

    def empty(shape: Any, **options: Any) -> Pinned:
        made.append((tuple(shape), options))
        return Pinned()

    here, there = torch.ones(2), torch.ones(3, device=META, dtype=torch.float16)
    monkeypatch.setattr(devices, "_backend", lambda device: torch.cuda)
    monkeypatch.setattr(torch, "empty", empty)
    assert devices.fetched(here) is here
    assert devices.fetched(there) == "there"
    assert made == [((3,), {"dtype": torch.float16, "pin_memory": True}), there]
