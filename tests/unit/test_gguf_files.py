"""Models in GGUF files are found and opened; what is in them is told by a fake."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from distributed_llm.common import gguf_files, hub_gguf, model_names
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.gguf_files import Refusal, models_among, open_gguf, parts_of
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.types import LayerRange

BLOB = "0123456789abcdef" * 4
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "quantization_config": {"quant_method": "gguf", "architecture": "llama"},
}


class FakeReader:
    """Plays the process that reads GGUF files.

    Attributes:
        read: the files of each model that it was asked for.
        refusal: what it says instead.
    """

    def __init__(self) -> None:
        self.read: list[list[str]] = []
        self.refusal: Refusal | None = None

    def __call__(self, files: Sequence[Path], out: Path) -> None:
        self.read.append([file.name for file in files])
        (out / "config.json").write_text(json.dumps(CONFIG))
        names = [f"blk.{layer}.attn_q.weight" for layer in (0, 1)]
        names += ["token_embd.weight", "output_norm.weight"]
        tensors = {n: TensorInfo(n, files[-1].name, "Q4_K", (4, 256), 64, 576) for n in names}
        (out / "tensors.json").write_bytes(msgspec.json.encode(tensors))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeReader:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "_write_texts", made := FakeReader())
    return made


def touch(path: Path, content: bytes = b"GGUF" + bytes(1000)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def resolved(model: Path | str) -> tuple[str, Path]:
    """Return the name of the source, and where the tensors are; as a worker sees them, too."""
    source, checkpoint = model_names.resolve_for_coordinator(str(model))
    assert source.kind == "folder"
    assert model_names.checkpoint_here(source, LayerRange(0, 2)) == checkpoint
    return source.name, checkpoint.path_of(checkpoint.tensors["token_embd.weight"].file)


def test_a_file_whatever_its_name(tmp_path: Path, reader: FakeReader) -> None:
    for name in ("tiny.gguf", "sha256-abc"):
        file = touch(tmp_path / name)
        assert resolved(file) == (str(file), file)
    assert reader.read == [["tiny.gguf"], ["sha256-abc"]]  # once each


def test_what_a_checkpoint_knows_of_names_in_gguf(tmp_path: Path, reader: FakeReader) -> None:
    checkpoint = open_gguf(touch(tmp_path / "tiny.gguf"))
    assert checkpoint.layer_of("blk.1.attn_q.weight") == 1
    assert checkpoint.outer.holds_embedding("token_embd.weight")
    assert not checkpoint.outer.holds_embedding("output_norm.weight")
    assert checkpoint.outer.ties_embeddings
    names = [tensor.name for tensor in checkpoint.tensors_of(LayerRange(1, 2))]
    assert sorted(names) == ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"]


def test_parts_of_a_model(tmp_path: Path, reader: FakeReader) -> None:
    files = [touch(tmp_path / "m" / f"a-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    touch(tmp_path / "m" / "mmproj-a.gguf")
    for model in (files[0], files[1], tmp_path / "m"):
        assert resolved(model) == (str(files[0]), files[2])
    assert reader.read == [[file.name for file in files]]
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"a-00002-of-00003\.gguf is not there"):
        model_names.resolve_for_coordinator(str(files[0]))


def test_a_folder_with_several_models(tmp_path: Path, reader: FakeReader) -> None:
    for name in ("a.Q4_0.gguf", "a.Q8_0.gguf"):
        touch(tmp_path / "m" / name)
    with pytest.raises(CheckpointError, match=r"a\.Q4_0\.gguf, a\.Q8_0\.gguf\. Give one of them"):
        model_names.resolve_for_coordinator(str(tmp_path / "m"))


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path, reader: FakeReader) -> None:
    file = touch(tmp_path / "tiny.gguf")
    first = open_gguf(file)
    os.utime(file, (1, 1))
    assert open_gguf(file).folder != first.folder
    assert len(reader.read) == 2


def test_texts_of_few_models_are_kept(
    tmp_path: Path, reader: FakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "_MAX_MODELS", 2)
    folders = []
    for number in range(4):
        folders.append(open_gguf(touch(tmp_path / f"{number}.gguf")).folder)
        os.utime(folders[-1], (number, number))
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    abandoned = folders[0].parent / "tmp-old"
    abandoned.mkdir()
    os.utime(abandoned, (1, time.time() - 100_000))
    open_gguf(touch(tmp_path / "more.gguf"))
    assert not abandoned.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGM", "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_a_file_that_is_something_else(
    tmp_path: Path, reader: FakeReader, content: bytes, words: str
) -> None:
    file = touch(tmp_path / "tiny.gguf", content)
    with pytest.raises(CheckpointError, match=f"^{file} .*{words}"):
        model_names.resolve_for_coordinator(str(file))
    assert reader.read == []


# ------------------------------------------------------------------ the process that reads


@pytest.mark.parametrize("unsupported", [True, False])
def test_a_refusal_of_the_reading_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsupported: bool
) -> None:
    def run(command: list[str], **options: object) -> object:
        refusal = Refusal("holds a mammoth. Use an elephant.", unsupported)
        Path(command[3], "refusal.json").write_bytes(msgspec.json.encode(refusal))
        return type("Done", (), {"returncode": 0, "stderr": b""})

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("subprocess.run", run)
    file = touch(tmp_path / "tiny.gguf")
    kind = UnsupportedModel if unsupported else CheckpointError
    with pytest.raises(CheckpointError, match=f"^{file} holds a mammoth") as caught:
        open_gguf(file)
    assert type(caught.value) is kind
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_reading_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    done = type("Done", (), {"returncode": -7, "stderr": b"MemoryError\n"})
    monkeypatch.setattr("subprocess.run", lambda *args, **options: done)
    with pytest.raises(CheckpointError, match="ended with exit code -7"):
        open_gguf(touch(tmp_path / "tiny.gguf"))


# ------------------------------------------------------------------ ollama


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the blob of the one model that ollama has."""
    folder = tmp_path / "ollama"
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "b" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{BLOB}"},
    ]
    for name in ("registry.ollama.ai/library/llama3.2/1b", "hf.co/org/name-GGUF/Q4_K_M"):
        touch(folder / "manifests" / name, json.dumps({"layers": layers}).encode())
    return touch(folder / "blobs" / f"sha256-{BLOB}")


def test_a_model_of_ollama_whose_file_is_gone(ollama: Path, reader: FakeReader) -> None:
    ollama.unlink()
    with pytest.raises(CheckpointError, match=r"is not there.*Run `ollama pull llama3\.2:1b`"):
        model_names.resolve_for_coordinator("ollama:llama3.2:1b")


@pytest.mark.parametrize("name", ["tiny.gguf:Q4", "models/tiny.gguf:Q4_K_M"])
def test_a_file_with_a_tag(name: str) -> None:
    for read in (model_names.resolve_for_coordinator, model_names.own_checkpoint):
        with pytest.raises(CheckpointError, match=r"^(models/)?tiny\.gguf:Q4.*Give .*gguf alone"):
            read(name)


@pytest.mark.parametrize("name", ["llama3.2:1b", "hf.co/org/name-GGUF:Q4_K_M"])
def test_a_model_of_ollama(ollama: Path, reader: FakeReader, name: str) -> None:
    assert resolved(f"ollama:{name}") == (f"ollama:{name}", ollama)


def test_a_model_of_ollama_with_an_adapter(
    ollama: Path, reader: FakeReader, tmp_path: Path
) -> None:
    (manifest,) = (tmp_path / "ollama").glob("manifests/*/*/llama3.2/1b")
    told = json.loads(manifest.read_text())
    told["layers"].append(
        {"mediaType": "application/vnd.ollama.image.adapter", "digest": "sha256:" + "c" * 64}
    )
    manifest.write_text(json.dumps(told))
    with pytest.raises(UnsupportedModel, match="Merge the adapter into its base model"):
        resolved("ollama:llama3.2:1b")


def test_a_model_that_ollama_lacks(ollama: Path, reader: FakeReader) -> None:
    with pytest.raises(CheckpointError, match=r"It has llama3\.2:1b\. Run `ollama pull llama3\.2`"):
        model_names.resolve_for_coordinator("ollama:llama3.2")
    source = ModelSource(kind="folder", name="ollama:llama3.2")
    assert model_names.checkpoint_here(source, LayerRange(0, 1)) is None


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a/b/c/d", "a:b:c", "x" * 4000])
def test_no_name_of_ollama(ollama: Path, reader: FakeReader, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a model of ollama") as caught:
        model_names.resolve_for_coordinator(f"ollama:{name}")
    assert len(str(caught.value)) < 400


# ------------------------------------------------------------------ names in a repository

PATHS = (
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_0.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "mmproj-m-F16.gguf",
)


def test_the_models_in_a_repository() -> None:
    assert models_among(PATHS) == ["m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf"]
    assert parts_of(PATHS[3]) == [PATHS[3], PATHS[4]]


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        ("org/m:q4_k_m", PATHS[1]),
        ("org/m:Q8_0@main", PATHS[3]),
        ("org/m/m-Q4_0.gguf", PATHS[2]),
        ("org/m:m-Q4_0.gguf", PATHS[2]),
    ],
)
def test_one_of_them_is_chosen(model: str, chosen: str) -> None:
    named = hub_gguf.parse_name(model)
    assert named is not None
    assert named[0].partition("@")[0] == "org/m"
    assert hub_gguf.choose(named[0], PATHS, named[1]) == chosen


@pytest.mark.parametrize("wanted", ["Q5_K_M", "F16", "4_0"])
def test_none_is_as_wanted(wanted: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such model.*it has m-Q4_0\.gguf, m-Q4_K_M"):
        hub_gguf.choose("org/m", PATHS, wanted)


@pytest.mark.parametrize(
    "model", ["org/m", "org/m@main", "models/x/y.txt", "org/../a.gguf", "m.gguf"]
)
def test_other_names_are_left_to_others(model: str) -> None:
    assert hub_gguf.parse_name(model) is None
