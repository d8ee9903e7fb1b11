"""Layers in the machine's memory are computed as others are, on a device made up of the CPU.

Its memory is apart: what a layer computes with has to be in buffers that copies were made into. Two
kinds of copies stand for the extremes of a GPU that copies while it computes: at once, and as late
as the marks between both allow.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.cuda import _pin_memory_utils

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import NotEnoughMemory
from distributed_llm.common.types import LayerRange
from distributed_llm.worker.compute import loading
from distributed_llm.worker.model import away_layers, weights
from distributed_llm.worker.model.away_layers import place_of
from distributed_llm.worker.model.device_buffers import DeviceBuffers, PinnedLayer
from distributed_llm.worker.model.device_copies import CudaCopies, copies_to
from distributed_llm.worker.model.kernels import chosen, packed_nbytes
from distributed_llm.worker.model.offload import LayerFile
from distributed_llm.worker.model.stage import Stage
from distributed_llm.worker.session.events import Load, Loaded, LoadFailed
from tests import encoder_decoders
from tests.checkpoints import make_checkpoint
from tests.made_up_copies import MadeUpCopies
from tests.made_up_gpus import gpu
from tests.model.driver import CPU, GREEDY, Pipeline
from tests.model.stack_driver import StackPipeline
from tests.model.workers import Cluster, workers
from tests.quantized_checkpoints import make_quantized
from tests.reference import reference_ids

PROMPT = [5, 17, 3, 99, 12]
TOKENS = 5
LAYERS = 6


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let weights be in the orders of a GPU, and files in a folder of the test."""
    monkeypatch.setattr(chosen, "SMALLEST", 1 << 40)
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> MadeUpCopies:
    """Return the copies of a device that stages are loaded to from now on, made late."""
    made = MadeUpCopies(late=True)
    monkeypatch.setattr(weights, "copies_to", lambda device: made)
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("llama"), num_layers=LAYERS))


def load(checkpoint: Checkpoint, **away: Any) -> Stage:
    whole = LayerRange(0, checkpoint.num_layers)
    return Stage.load(checkpoint, whole, device=CPU, dtype=torch.float32, **away)


def answer(stage: Stage) -> list[int]:
    """Return what greedy sampling adds to the prompt."""
    pipeline = Pipeline([stage])
    pipeline.prefill([PROMPT], [2])
    for _ in range(TOKENS):
        pipeline.decode()
    return pipeline.texts[0][len(PROMPT) :]


def places(stage: Stage) -> list[Any]:
    return [place for layer in stage._held.layers if (place := place_of(layer)) is not None]


# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("from_ram", "from_disk"), [(1, 0), (3, 0), (2, 3)])
def test_tokens_are_those_of_transformers(
    checkpoint: Checkpoint, copies: MadeUpCopies, from_ram: int, from_disk: int, late: bool
) -> None:
    copies.late = late
    stage = load(checkpoint, from_ram=from_ram, from_disk=from_disk)
    kinds = [type(place) for place in places(stage)]
    assert (kinds.count(PinnedLayer), kinds.count(LayerFile)) == (from_ram, from_disk)
    assert answer(stage) == reference_ids(checkpoint.folder, PROMPT, TOKENS)


@pytest.mark.parametrize(("files", "kind"), [("awq", "xpu"), ("mlx", "mps"), ("w8a8", "cuda")])
def test_integers_are_copied_too(
    files: str, kind: str, tmp_path: Path, copies: MadeUpCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(away_layers, "_SMALLEST", 64)
    packed, plain = make_quantized(tmp_path, files)
    with gpu(kind, monkeypatch):
        stage = load(open_checkpoint(packed), from_ram=2)
        assert answer(stage) == reference_ids(plain, PROMPT, TOKENS)
    assert sum(place.nbytes for place in places(stage)) >= packed_nbytes(stage._held.layers) > 0


@pytest.fixture
def nowhere_else(monkeypatch: pytest.MonkeyPatch, copies: MadeUpCopies) -> MadeUpCopies:
    """Let weights be no numbers at home, so that no layer computes with them there."""

    def go_home(place: PinnedLayer) -> None:
        place.lie_in(place.views_in(torch.full_like(place.memory, 0xFF)))

    monkeypatch.setattr(PinnedLayer, "go_home", go_home)
    monkeypatch.setattr(away_layers, "_SMALLEST", 1)
    return copies


@pytest.mark.parametrize(
    "family", ["gpt_oss", "deepseek_v2", "gemma3n_text", "qwen3_next", "zamba2"]
)
def test_no_layer_computes_with_weights_that_are_away(
    family: str, tmp_path: Path, nowhere_else: MadeUpCopies
) -> None:
    """Latents, experts, states, inputs of each layer, blocks that several call."""
    made = open_checkpoint(make_checkpoint(tmp_path, family, num_layers=LAYERS))
    stage = load(made, from_ram=LAYERS)
    assert answer(stage) == reference_ids(made.folder, PROMPT, TOKENS)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_both_stacks_may_be_away(
    model_type: str, tmp_path: Path, nowhere_else: MadeUpCopies
) -> None:
    made = open_checkpoint(encoder_decoders.make(tmp_path, model_type))
    source = encoder_decoders.numbers(9, 1)
    pipeline = StackPipeline(made)
    pipeline.stages = [load(made, from_ram=made.num_layers)]
    pipeline.read([source], (encoder_decoders.START,))
    for length in range(1, TOKENS + 1):
        pipeline.answers[0] += pipeline.step([(0, length - 1, length)], GREEDY)
    whole = encoder_decoders.build(model_type)
    assert pipeline.answers[0][1:] == encoder_decoders.answered(whole, source, TOKENS)


# ------------------------------------------------------------------ memory


def test_no_more_than_two_layers_are_on_the_device(
    checkpoint: Checkpoint, copies: MadeUpCopies
) -> None:
    whole = load(checkpoint)
    assert copies.buffers == []
    parts = load(checkpoint, from_ram=5)
    sizes = [place.nbytes for place in places(parts)]
    assert len(copies.buffers) == 2
    assert max(sizes) <= copies.buffers[0].nbytes == copies.buffers[1].nbytes < max(sizes) + 4096
    taken = sum(buffer.nbytes for buffer in copies.buffers)
    assert parts.weight_bytes == whole.weight_bytes - sum(sizes) + taken
    assert answer(parts) == answer(whole)
    assert len(copies.buffers) == 2


def test_weights_are_in_a_buffer_while_a_layer_computes_and_at_home_else(
    checkpoint: Checkpoint, copies: MadeUpCopies
) -> None:
    stage = load(checkpoint, from_ram=3)
    seen: list[bool] = []

    def look(layer: nn.Module, *_: Any) -> None:
        seen.append(is_in(layer, copies.buffers))

    gone = [layer for layer in stage._held.layers if place_of(layer)]
    for layer in gone:
        layer.register_forward_hook(look, prepend=True)
    answer(stage)
    assert len(seen) == 3 * (TOKENS + 1)
    assert all(seen)
    assert all(is_in(layer, [place_of(layer).memory]) for layer in gone)  # type: ignore[union-attr]


def is_in(layer: nn.Module, memories: list[Tensor]) -> bool:
    """Return whether all large weights of a layer are in one of these pieces of memory."""
    storages = {memory.untyped_storage().data_ptr() for memory in memories}
    large = [weight for weight in layer.parameters() if weight.nbytes >= 4096]
    return bool(large) and all(w.untyped_storage().data_ptr() in storages for w in large)


def test_memory_is_unlocked_with_the_stage(checkpoint: Checkpoint, copies: MadeUpCopies) -> None:
    stage = load(checkpoint, from_ram=3)
    assert len(copies.locked) == 3
    answer(stage)  # the first layer is on its way again
    del stage
    gc.collect()
    assert copies.locked == set()


def test_a_stage_shares_layers_with_another(checkpoint: Checkpoint, copies: MadeUpCopies) -> None:
    donor = load(checkpoint, from_ram=3)
    expected = answer(donor)
    new = load(checkpoint, from_ram=3, donor=donor)
    assert places(new) == places(donor)
    assert len(copies.locked) == 3
    taken = sum(buffer.nbytes for buffer in copies.buffers[2:])
    assert new.weight_bytes - new.shared_weight_bytes == pytest.approx(taken, abs=4096 * LAYERS)
    for stage in (new, donor, new):
        stage.reset()
        assert answer(stage) == expected
    donor.reset()
    del donor
    gc.collect()
    new.reset()
    assert answer(new) == expected


# ------------------------------------------------------------------ order


def buffers_of(count: int, copies: MadeUpCopies) -> tuple[DeviceBuffers, list[PinnedLayer]]:
    layers = [nn.Linear(32, 33, bias=False).requires_grad_(False) for _ in range(count)]
    made = [PinnedLayer(layer, copies) for layer in layers]
    for number, place in enumerate(made):
        copies.names[place.memory.data_ptr()] = f"layer {number}"
    return DeviceBuffers(made, copies), made


def test_the_next_layer_is_copied_while_one_computes_and_over_none_that_does() -> None:
    copies = MadeUpCopies()
    buffers, layers = buffers_of(3, copies)
    for number in (0, 1, 2, 0, 1):
        buffers.use(layers[number])
        copies.log.append(f"compute {number}")
        buffers.done()
        buffers.bring(layers[(number + 1) % 3], layers[(number + 2) % 3])
    assert copies.log == [
        "layer 0 to buffer 1 after point 1",  # both are free at first: points 1 and 2
        *("wait for layer 0 in buffer 1", "compute 0"),
        "layer 1 to buffer 2 after point 2",
        *("wait for layer 1 in buffer 2", "compute 1"),
        "layer 2 to buffer 1 after point 3",  # where layer 0 has computed
        *("wait for layer 2 in buffer 1", "compute 2"),
        "layer 0 to buffer 2 after point 4",  # layer 1
        *("wait for layer 0 in buffer 2", "compute 0"),
        "layer 1 to buffer 1 after point 5",  # layer 2
        *("wait for layer 1 in buffer 1", "compute 1"),
        "layer 2 to buffer 2 after point 6",  # layer 0
    ]


def test_two_layers_are_copied_once() -> None:
    copies = MadeUpCopies()
    buffers, layers = buffers_of(2, copies)
    for number in (0, 1) * 3:
        buffers.use(layers[number])
        buffers.done()
        buffers.bring(layers[1 - number], layers[number])
    assert sum(" to " in line for line in copies.log) == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_that_fails_or_is_left_out_does_no_harm(late: bool) -> None:
    copies = MadeUpCopies(late)
    buffers, layers = buffers_of(4, copies)
    for number in (0, 2, 3, 3, 1, 0, 2):  # nobody says that they are done
        buffers.use(layers[number])
        weight = layers[number]._tensors[0]
        assert is_in(nn.ParameterList([weight]), copies.buffers)
        assert torch.equal(weight, layers[number]._home[0])
        buffers.bring(layers[(number + 1) % 4], layers[(number + 2) % 4])
        assert torch.equal(weight, layers[number]._home[0]), "still computes"


def test_a_file_is_read_ahead_of_its_copy(
    checkpoint: Checkpoint, copies: MadeUpCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load(checkpoint, from_disk=3)
    files = places(stage)
    for number, file in enumerate(files):
        copies.names[file.memory.data_ptr()] = f"file {number}"
        monkeypatch.setattr(file, "read_ahead", lambda n=number: copies.log.append(f"read {n}"))
    Pipeline([stage]).prefill([PROMPT], [1])
    copies.log.clear()
    Pipeline([stage]).prefill([PROMPT], [1])
    told = [line for line in copies.log if line.startswith("file") or line.startswith("read")]
    assert [line.partition(" to ")[0] for line in told] == [
        *("file 1", "read 2", "file 2", "read 0", "file 0", "read 1"),
    ]


# ------------------------------------------------------------------ workers


def test_workers_do_as_they_are_told(
    checkpoint: Checkpoint, copies: MadeUpCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (0, checkpoint.num_layers)
    with workers("a") as held:
        cluster = Cluster(checkpoint.folder, [("a", whole)], held)
        orders = [Load(0, cluster.order(e, whole, from_ram=n)) for e, n in ((2, 4), (3, 0), (4, 4))]
        away, here = (held["a"].ask(order, Loaded) for order in orders[:2])
        monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 300 << 20)
        monkeypatch.setattr(loading, "_RESERVE_BYTES", 300 << 20)
        failed = held["a"].ask(orders[2], LoadFailed)
    assert here.weight_bytes - away.weight_bytes == pytest.approx(2 * layer_bytes(checkpoint), 0.2)
    assert isinstance(failed.error, NotEnoughMemory)
    assert "are to stay in this machine's memory beside its GPU, but 300.0 MiB are free" in str(
        failed.error
    )


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a layer in float32."""
    weights = [w for w in checkpoint.weights.values() if checkpoint.layer_of(w.name) == 0]
    return sum(checkpoint.weight_bytes(weight, "float32", "none") for weight in weights)


# ------------------------------------------------------------------ devices


class Streams:
    """Stands for `torch.cuda`; writes down what is asked of its streams."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.current = "compute"

    def Stream(self, device: torch.device) -> Any:
        return self._stream("copies")

    def current_stream(self, device: torch.device) -> Any:
        return self._stream(self.current)

    def _stream(self, name: str) -> Any:
        wait = lambda event: self.log.append(f"{name} wait for {event.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_event=wait)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def Event(self) -> Any:
        event = SimpleNamespace(name="")

        def record(stream: Any) -> None:
            event.name = f"event {len(self.log)} of {stream.name}"
            self.log.append(event.name)

        event.record = record
        return event


def test_a_gpu_copies_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    streams = Streams(log)
    for name in ("Stream", "current_stream", "stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name} use it")
    )
    monkeypatch.setattr(
        Tensor,
        "copy_",
        lambda tensor, source, non_blocking: log.append(f"{streams.current} copy {non_blocking}"),
    )
    copies = CudaCopies(CPU)
    buffer = copies.buffer(8)
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (8,))
    copies.wait(copies.copy(torch.zeros(8), buffer, copies.reached()))
    assert log == [
        "copies use it",
        "event 1 of compute",
        "copies wait for event 1 of compute",
        "copies copy True",
        "event 4 of copies",
        "compute wait for event 4 of copies",
    ]


def test_memory_that_cannot_be_locked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(place: int, size: int) -> None:
        raise RuntimeError(f"Registering memory failed with cudaError: {size}.")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(_pin_memory_utils, "pin_memory", failing)
    with pytest.raises(NotEnoughMemory, match=r"2.0 KiB .* cannot be locked .*cudaError: 2048"):
        CudaCopies(CPU).lock(torch.zeros(2048, dtype=torch.uint8))


def test_other_devices_have_no_copies() -> None:
    assert [copies_to(torch.device(kind)) for kind in ("cpu", "mps", "xpu", "meta")] == [None] * 4
