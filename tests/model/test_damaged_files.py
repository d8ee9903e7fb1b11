"""Files of models, damaged in every way that is known, refused in the same words by plan and stage.

Each damage is done to a model that is whole. What is refused is refused before anything is planned,
by an error of ours that names the file and says what to do, and shows nothing of Python.
"""

import json
import random
import re
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest

from distributed_llm.common import gguf_files
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.gguf_texts.texts import write_texts_or_refusal
from tests.checkpoints import build_model, make_checkpoint
from tests.damages import (
    Json,
    damaged_values,
    judged,
    paths_in,
    put,
    value_at,
)
from tests.gguf_models import write_gguf
from tests.quantized_checkpoints import make_quantized


@pytest.fixture(autouse=True)
def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have GGUF files read here, which takes milliseconds instead of seconds."""

    def run(files: Sequence[Path], out: Path) -> "subprocess.CompletedProcess[bytes]":
        write_texts_or_refusal(files, out)
        return subprocess.CompletedProcess([], 0, b"", b"")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "_run", run)


# ------------------------------------------------------------------ safetensors and its JSON files


def header_of(file: bytes) -> Json:
    header: Json = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return header


def with_header(file: bytes, header: Json) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + file[8 + int.from_bytes(file[:8], "little") :]


SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), num_layers=1)


def test_headers_of_safetensors(plain: Path, tmp_path: Path) -> None:
    numbers, file = random.Random(7), (plain / "model.safetensors").read_bytes()
    header = header_of(file)
    (tmp_path / "m").mkdir()
    copy = tmp_path / "m" / "model.safetensors"
    (tmp_path / "m" / "config.json").write_bytes((plain / "config.json").read_bytes())
    paths = [path for path in paths_in(header) if path[0] != "__metadata__"]
    for path in numbers.sample(paths, 12):
        for value in damaged_values(value_at(header, path), numbers):
            copy.write_bytes(with_header(file, put(header, path, value)))
            assert judged(tmp_path / "m"), (path, value)
    for content in (b"", file[:7], file[:100], file[:-1], file + b"x", file[:8] + bytes(500)):
        copy.write_bytes(content)
        assert judged(tmp_path / "m"), content[:10]
    for name in numbers.sample(sorted(header), 5):
        if name != "__metadata__":
            copy.write_bytes(with_header(file, {**header, f"{name}x": header[name]}))
            assert judged(tmp_path / "m"), name


@pytest.mark.parametrize("kind", ["gptq", "mlx", "fp8", "nf4"])
def test_quantized_weights(tmp_path: Path, kind: str) -> None:
    numbers = random.Random(7)
    folder, _ = make_quantized(tmp_path, kind)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = next(n for n in ("quantization_config", "quantization") if n in config)
    places = list(paths_in(config[settings], settings))
    for place in numbers.sample(places, min(len(places), 4)):
        value = numbers.choice(list(damaged_values(value_at(config, place), numbers)))
        path.write_text(json.dumps(put(config, place, value)))
        judged(folder)
    path.write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    file = weights.read_bytes()
    header = header_of(file)
    parts = sorted(n for n in header if ".layers.0." in n and not n.endswith("norm.weight"))
    name = numbers.choice(parts)
    *stack, last = header[name]["shape"]
    for shape in ([last, *stack], [1, *stack, last], [*stack, last // 2, 2]):
        weights.write_bytes(with_header(file, put(header, (name, "shape"), shape)))
        judged(folder)
    without = {n: entry for n, entry in header.items() if n != name}
    weights.write_bytes(with_header(file, {**without, "x": header[name]}))
    judged(folder)


def test_small_parts_of_quantized_weights(tmp_path: Path) -> None:
    """They are read for a plan: what order columns are in, and codes of more bits than are said."""
    gptq, _ = make_quantized(tmp_path / "gptq", "gptq")
    weights = gptq / "model.safetensors"
    file, header = bytearray(weights.read_bytes()), header_of(weights.read_bytes())
    start = 8 + int.from_bytes(file[:8], "little")
    at = start + next(e["data_offsets"][0] for n, e in header.items() if n.endswith(".g_idx"))
    file[at : at + 4] = (99).to_bytes(4, "little")
    weights.write_bytes(file)
    assert "g_idx in model.safetensors names groups" in judged(gptq)
    w8a8, _ = make_quantized(tmp_path / "w8a8", "w8a8")
    text = (w8a8 / "config.json").read_text()
    (w8a8 / "config.json").write_text(re.sub(r'"num_bits": 8', '"num_bits": 4', text))
    assert "config.json says that codes have 4 bits" in judged(w8a8)


# ------------------------------------------------------------------ GGUF


@dataclass(frozen=True)
class Place:
    """A number in the header of a GGUF file.

    Attributes:
        what: it is.
        at: byte where it stands.
        form: of `struct`.
    """

    what: str
    at: int
    form: str


def places_in(path: Path) -> Iterator[Place]:
    """Yield the numbers in the header of a GGUF file, but for the elements of arrays."""
    yield from (Place("version", 4, "<I"), Place("tensors", 8, "<Q"), Place("fields", 16, "<Q"))
    reader = gguf.GGUFReader(path)
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        kind = field.offset + 8 + len(field.name)
        yield Place(f"length of {field.name}", field.offset, "<Q")
        yield Place(f"type of {field.name}", kind, "<I")
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            yield Place(f"elements of {field.name}", kind + 4, "<I")
            yield Place(f"count of {field.name}", kind + 8, "<Q")
        elif field.types[0] == gguf.GGUFValueType.STRING:
            yield Place(f"length of the text {field.name}", kind + 4, "<Q")
        else:
            yield Place(field.name, kind + 4, "<I")
    for tensor in reader.tensors:
        at = tensor.field.offset
        yield Place(f"length of {tensor.name}", at, "<Q")
        at += 8 + len(tensor.name)
        yield Place(f"dimensions of {tensor.name}", at, "<I")
        for number in range(len(tensor.shape)):
            yield Place(f"size {number} of {tensor.name}", at + 4 + 8 * number, "<Q")
        at += 4 + 8 * len(tensor.shape)
        yield Place(f"kind of {tensor.name}", at, "<I")
        yield Place(f"offset of {tensor.name}", at + 4, "<Q")


def damaged_numbers(number: int, form: str) -> list[int]:
    most = 2 ** (8 * struct.calcsize(form)) - 1
    values = {0, 1, 39, 99, number + 1, number + 32, number * 2, most // 16, most}
    return [value for value in sorted(values) if value not in (number, most + 1) and value <= most]


_HARMLESS = re.compile(
    r"context_length|token_id|rms_epsilon|freq_base|^type of .*(count|length)|token_type"
)
"""Numbers that a model can do without, or that may be others as well."""


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_headers_of_gguf(tmp_path: Path, kind: str) -> None:
    numbers = random.Random(7)
    model = build_model("llama", num_layers=1, vocab_size=320)
    path = write_gguf(tmp_path / "tiny.gguf", model, kind)
    whole = path.read_bytes()
    assert judged(path) == ""
    places = list(places_in(path))
    assert len(places) > 100
    for place in numbers.sample(places, 14):
        (number,) = struct.unpack_from(place.form, whole, place.at)
        damaged = bytearray(whole)
        value = numbers.choice(damaged_numbers(number, place.form))
        struct.pack_into(place.form, damaged, place.at, value)
        path.write_bytes(damaged)
        assert judged(path) or _HARMLESS.search(place.what), (place, value)
    for cut in numbers.sample(range(len(whole)), 8):
        path.write_bytes(whole[:cut])
        assert judged(path), cut
