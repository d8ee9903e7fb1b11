"""Models from a folder and from a hub: a small HTTP server on this machine plays the hub."""

import errno
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import save_file

from distributed_llm.common import hub, model_names
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.errors import CheckpointError, CheckpointUnavailable
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.other_formats import INDEX_NAME, SINGLE_NAME
from distributed_llm.common.types import LayerRange

NAME = "org/tiny-model"
COMMIT = "c0ffee" * 6 + "1234"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "vocab_size": 16,
    "num_attention_heads": 2,
}


def write_model(folder: Path) -> Path:
    """Write a model of four layers in three files: 0 | 1, 2 | 3 and the head."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def layer(i: int) -> dict[str, Any]:
        shape = (8, 64)
        return {f"model.layers.{i}.mlp.weight": rng.standard_normal(shape).astype(np.float32)}

    table = rng.standard_normal((16, 8)).astype(np.float32)
    files = [
        {"model.embed_tokens.weight": table} | layer(0),
        layer(1) | layer(2),
        layer(3) | {"model.norm.weight": table[0], "lm_head.weight": table + 1},
    ]
    for name, tensors in zip(SHARDS, files, strict=True):
        save_file(tensors, folder / name)
    weight_map = {t: name for name, ts in zip(SHARDS, files, strict=True) for t in ts}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@dataclass
class FakeHub:
    """What the hub answers, and what it was asked.

    Attributes:
        bodies: the files that were asked for in full, in order.
        status: the answer to everything, if not 0; `error_code` goes with it.
        cut_after: bytes of a weight file after which the connection breaks, or None.
    """

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    status: int = 0
    error_code: str = ""
    cut_after: int | None = None

    def files(self) -> list[str]:
        paths = [p for p in self.folder.rglob("*") if p.is_file()]
        return sorted(p.relative_to(self.folder).as_posix() for p in paths)


class Handler(BaseHTTPRequestHandler):
    """The four addresses of the hub that its library uses."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status:
            self.reply(self.hub.status, b"{}", {"X-Error-Code": self.hub.error_code})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self.reply_json([self.entry(name) for name in self.hub.files()])
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": name} for name in self.hub.files()]
            self.reply_json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{NAME}/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.file(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"), body=body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        size = (self.hub.folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": f"{hash(name) % 16**8:040x}"}

    def file(self, name: str, *, body: bool) -> None:
        if name not in self.hub.files():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = (self.hub.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(name) % 16**8:040x}"'}
        span = self.headers.get("Range")
        if not body:
            self.reply(200, content, headers)
        elif span and not span.endswith("-"):  # a look at the header
            first, last = (int(x) for x in span.removeprefix("bytes=").split("-"))
            self.reply(206, content[first : last + 1], headers)
        else:
            first = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
            self.hub.bodies.append(name)
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            cut = self.hub.cut_after if name.endswith(".safetensors") else None
            self.reply(206 if span else 200, content[first:], headers, cut)

    def reply_json(self, content: Any) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(
        self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        self.close_connection = cut is not None


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(write_model(tmp_path / "origin"))
    handler = type("BoundHandler", (Handler,), {"hub": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(hub, "_api", lambda: HfApi(endpoint=fake.url, token=False))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits before it retries
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def hub_source(fake: FakeHub) -> ModelSource:
    return model_names.resolve_for_coordinator(NAME)[0]


def weights_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def on_worker(source: ModelSource, layers: LayerRange, *, local_model: str = "") -> Checkpoint:
    """Return the checkpoint with the weights of `layers`, as a worker gets it by itself."""
    here = model_names.checkpoint_here(source, layers, local_model=local_model)
    if here is not None:
        return here
    assert source.kind == "hub"
    config = hub.download_file(source, "config.json", lambda nbytes: None)
    described = hub.checkpoint_on_hub(source.name, config.parent)
    for file in sorted({tensor.file for tensor in described.tensors_of(layers)}):
        hub.download_file(source, file, lambda nbytes: None)
    got = model_names.checkpoint_here(source, layers)
    assert got is not None
    return got


# ------------------------------------------------------------------ on this machine


def test_no_name_is_the_model_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "builtin")
    monkeypatch.setattr(model_names, "_builtin_folder", lambda: folder)
    source, checkpoint = model_names.resolve_for_coordinator("")
    assert source == ModelSource(kind="builtin", name="")
    assert on_worker(source, LayerRange(0, 4), local_model="/elsewhere") == checkpoint


def test_the_model_in_the_package_lies_in_the_package() -> None:
    folder = model_names._builtin_folder()
    assert folder.name == "builtin_model"
    assert (folder.parent / "py.typed").exists()


def test_a_folder_is_named_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    source, checkpoint = model_names.resolve_for_coordinator("models/../models/tiny")
    assert source == ModelSource(kind="folder", name=str(folder))
    assert on_worker(source, LayerRange(1, 2)) == checkpoint


def test_a_worker_without_the_folder_has_no_copy(tmp_path: Path) -> None:
    source = ModelSource(kind="folder", name=str(tmp_path / "absent"))
    assert model_names.checkpoint_here(source, LayerRange(0, 1)) is None


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_worker_may_have_its_own_copy(tmp_path: Path, kind: Any) -> None:
    folder = write_model(tmp_path / "copy")
    source = ModelSource(kind=kind, name="nobody/has-this", revision=COMMIT)
    checkpoint = on_worker(source, LayerRange(0, 1), local_model=str(folder))
    assert checkpoint.folder == folder


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("../../etc/no-such-file", "There is no folder"),
        ("./tiny", "There is no folder"),
        ("~/no-such-model", "There is no folder"),
        ("~nobody-is-called-so/model", "There is no folder"),
        ("/models/tiny", "There is no folder"),
        ("models/llama/tiny", "There is no folder"),
        (r"C:\models\tiny", r"'C:\\models\\tiny' .* In WSL it is /mnt/c/models/tiny\."),
        ("d:/tiny", r"In WSL it is /mnt/d/tiny\."),
        ("http://169.254.169.254/", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("a\\b", "neither a folder"),
        ("org/model\n", "neither a folder"),
        ("org/model\nX-Header: 1", "neither a folder"),
        ("org/mo\0del", "neither a folder"),
        ("org/..", "neither a folder"),
        ("org/mo..del", "neither a folder"),
        ("-org/model", "neither a folder"),
        ("x" * 1_000_000, "neither a folder"),
        ("org/" + "x" * 200, "neither a folder"),
        ("org/model@", "no revision"),
        ("org/model@../../etc", "no revision"),
        ("org/model@a\nb", "no revision"),
        ("org/model@/etc", "no revision"),
    ],
)
def test_a_bad_name_is_refused_before_any_socket(
    model: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_names.resolve_for_coordinator(model)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("../x", COMMIT, "neither a folder"),
        ("a/b", "main", "no commit"),
        ("a/b", "", "no commit"),
        ("a/b", "../" * 13, "no commit"),
    ],
)
def test_a_worker_does_not_trust_what_the_coordinator_names(
    fake: FakeHub, name: str, revision: str, words: str
) -> None:
    source = ModelSource(kind="hub", name=name, revision=revision)
    with pytest.raises(CheckpointError, match=words):
        on_worker(source, LayerRange(0, 1))
    assert fake.requests == []


# ------------------------------------------------------------------ from the hub


def test_the_coordinator_fetches_no_weights_and_no_code(fake: FakeHub) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    (fake.folder / template).parent.mkdir()
    (fake.folder / template).write_text("{{ tools }}")
    source, checkpoint = model_names.resolve_for_coordinator(f"{NAME}@main")
    assert source == ModelSource(kind="hub", name=NAME, revision=COMMIT)
    texts = [template, "config.json", INDEX_NAME, "tokenizer.json"]
    assert sorted(set(fake.bodies)) == sorted(texts)
    assert weights_in(checkpoint.folder) == []
    assert checkpoint.num_layers == 4
    whole = open_checkpoint(fake.folder)
    assert {t.name: (t.file, t.shape, t.nbytes) for t in checkpoint.tensors.values()} == {
        t.name: (t.file, t.shape, t.nbytes) for t in whole.tensors.values()
    }


@pytest.mark.parametrize(
    ("start", "stop", "shards"),
    [(0, 1, [0]), (1, 2, [1]), (1, 3, [1]), (0, 2, [0, 1]), (2, 4, [1, 2]), (0, 4, [0, 1, 2])],
)
def test_a_worker_fetches_only_the_files_of_its_layers(
    fake: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
    stop: int,
    shards: list[int],
) -> None:
    source, ours = model_names.resolve_for_coordinator(NAME)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other machine"))
    fake.bodies.clear()
    layers = LayerRange(start, stop)
    theirs = on_worker(source, layers)
    wanted = [SHARDS[i] for i in shards]
    assert sorted(name for name in fake.bodies if name.endswith(".safetensors")) == wanted
    assert weights_in(theirs.folder) == wanted
    assert theirs.fingerprints(layers, sampled=False) == ours.fingerprints(layers, sampled=False)
    assert theirs.fingerprints(layers, sampled=True) == open_checkpoint(fake.folder).fingerprints(
        layers, sampled=True
    )


def test_a_second_start_needs_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ours = model_names.resolve_for_coordinator(NAME)
    theirs = on_worker(source, LayerRange(0, 2))
    fake.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, checkpoint = model_names.resolve_for_coordinator(NAME)
    assert again == source
    assert checkpoint.fingerprints(LayerRange(0, 4), sampled=False) == ours.fingerprints(
        LayerRange(0, 4), sampled=False
    )
    assert on_worker(source, LayerRange(0, 2)) == theirs
    assert fake.requests == []


PICTURES = "model-00004-of-00004.safetensors"


def with_pictures(fake: FakeHub) -> None:
    """Have the model on the hub read pictures too: its text model is what it was, a file is new."""
    pictures = {f"visual.blocks.{i}.mlp.weight": np.zeros((8, 8), np.float32) for i in range(6)}
    save_file(pictures, fake.folder / PICTURES)
    index = fake.folder / INDEX_NAME
    weight_map = json.loads(index.read_text())["weight_map"] | dict.fromkeys(pictures, PICTURES)
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "qwen2_vl", "text_config": {**CONFIG, "num_key_value_heads": 2}}
    (fake.folder / "config.json").write_text(json.dumps(config))


def test_of_a_model_for_pictures_only_files_of_the_text_model_are_fetched(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pictures(fake)
    layers = LayerRange(0, 4)
    source, ours = model_names.resolve_for_coordinator(NAME)
    assert {tensor.file for tensor in ours.tensors.values()} == set(SHARDS)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other machine"))
    theirs = on_worker(source, layers)
    assert weights_in(theirs.folder) == SHARDS
    assert theirs.model_type == ours.model_type == "qwen2_vl_text"
    everything = model_names.fingerprints(source, ours, layers)
    prints = model_names.fingerprints(source, theirs, layers)
    assert theirs.digest(layers, prints) == ours.digest(layers, everything)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "third machine"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    as_others_cache_it(fake)
    _, third = model_names.resolve_for_coordinator(NAME)
    assert third.tensors == theirs.tensors


def as_others_cache_it(fake: FakeHub, *, without: tuple[str, ...] = ()) -> Path:
    """Put the model into the cache as transformers does: no list of tensors, no list of files."""
    repository = Path(constants.HF_HUB_CACHE) / "models--org--tiny-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", INDEX_NAME, *SHARDS):
        if name not in without:
            shutil.copy(fake.folder / name, snapshot / name)
    return snapshot


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_that_others_filled_needs_no_network(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    snapshot = as_others_cache_it(fake)
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        fake.status = 503
    source, ours = model_names.resolve_for_coordinator(NAME)
    assert source == ModelSource(kind="hub", name=NAME, revision=COMMIT)
    assert ours.folder == snapshot
    layers = LayerRange(1, 3)
    theirs = on_worker(source, layers)
    everything = model_names.fingerprints(source, ours, LayerRange(0, 4))
    prints = model_names.fingerprints(source, theirs, layers)
    assert theirs.digest(layers, prints) == ours.digest(layers, everything)


def test_both_sides_agree_whether_the_weights_were_here_or_not(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, without = model_names.resolve_for_coordinator(NAME)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other machine"))
    as_others_cache_it(fake)
    layers = LayerRange(0, 2)
    theirs = on_worker(source, layers)
    prints = model_names.fingerprints(source, theirs, layers)
    everything = model_names.fingerprints(source, without, LayerRange(0, 4))
    assert theirs.digest(layers, prints) == without.digest(layers, everything)


def test_an_incomplete_cache_offline_names_what_is_missing(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_others_cache_it(fake, without=(SHARDS[1],))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"HF_HUB_OFFLINE is set.*Not here yet: {SHARDS[1]}"):
        model_names.resolve_for_coordinator(NAME)


def test_texts_that_the_cache_lacks_are_no_fault_offline(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library knows the list of files and calls the snapshot incomplete."""
    (fake.folder / "vocab.json").write_text("{}")
    source, _ = model_names.resolve_for_coordinator(NAME)
    on_worker(source, LayerRange(0, 4))
    snapshot = Path(constants.HF_HUB_CACHE) / "models--org--tiny-model" / "snapshots" / COMMIT
    (snapshot / "vocab.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, _ = model_names.resolve_for_coordinator(NAME)
    assert again == source
    on_worker(source, LayerRange(0, 4))
    (snapshot / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=f"Not here yet: {SHARDS[0]}"):
        on_worker(source, LayerRange(0, 1))


def test_a_broken_file_in_the_cache_is_to_be_deleted(fake: FakeHub) -> None:
    """The library would not download it again while it is there."""
    checkpoint = on_worker(hub_source(fake), LayerRange(0, 1))
    path = (checkpoint.folder / SHARDS[0]).resolve()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"Delete {path} and start again"):
        on_worker(hub_source(fake), LayerRange(0, 1))
    path.unlink()
    on_worker(hub_source(fake), LayerRange(0, 1))


def test_a_text_in_the_cache_that_is_something_else_is_named(fake: FakeHub) -> None:
    """As it stands in a repository whose files were pushed without git-lfs."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
    (fake.folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a git-lfs pointer"):
        model_names.resolve_for_coordinator(NAME)


def test_weights_that_are_here_anyway_can_be_sampled(fake: FakeHub) -> None:
    source = hub_source(fake)
    on_worker(source, LayerRange(0, 4))
    _, checkpoint = model_names.resolve_for_coordinator(NAME)
    whole = open_checkpoint(fake.folder)
    assert checkpoint.fingerprints(LayerRange(0, 4), sampled=True) == whole.fingerprints(
        LayerRange(0, 4), sampled=True
    )


def test_weights_have_one_name_with_and_without_them_on_disk(fake: FakeHub) -> None:
    source, without = model_names.resolve_for_coordinator(NAME)
    layers = LayerRange(0, 1)
    here = on_worker(source, layers)
    everything = model_names.fingerprints(source, without, LayerRange(0, 4))
    name = here.digest(layers, model_names.fingerprints(source, here, layers))
    assert name == without.digest(layers, everything)
    assert name != without.digest(LayerRange(1, 2), everything)


def test_an_index_that_names_a_file_in_another_folder(fake: FakeHub) -> None:
    (fake.folder / SHARDS[0]).rename(fake.folder / "onnx" / "a.safetensors")
    weight_map = {"model.embed_tokens.weight": "onnx/a.safetensors"}
    (fake.folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="not a safetensors file in the same folder"):
        model_names.resolve_for_coordinator(NAME)


def test_a_model_in_one_file(fake: FakeHub) -> None:
    (fake.folder / SHARDS[1]).rename(fake.folder / SINGLE_NAME)
    (fake.folder / INDEX_NAME).unlink()
    (fake.folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 4}))
    source, checkpoint = model_names.resolve_for_coordinator(NAME)
    assert {t.file for t in checkpoint.tensors.values()} == {SINGLE_NAME}
    with pytest.raises(CheckpointError, match="no tensors of layer 0"):
        on_worker(source, LayerRange(0, 1))


def test_a_broken_list_of_tensors_is_fetched_again(fake: FakeHub) -> None:
    _, checkpoint = model_names.resolve_for_coordinator(NAME)
    kept = checkpoint.folder / hub._TENSORS_NAME
    kept.write_text('{"a": 1')
    assert model_names.resolve_for_coordinator(NAME)[1] == checkpoint


def test_an_interrupted_download_is_reported_and_taken_up_again(fake: FakeHub) -> None:
    source = hub_source(fake)
    fake.cut_after = 1000
    with pytest.raises(CheckpointUnavailable, match=r"org/tiny-model cannot be fetched.*try again"):
        on_worker(source, LayerRange(0, 1))
    assert not (
        Path(constants.HF_HUB_CACHE) / "models--org--tiny-model" / "snapshots" / COMMIT / SHARDS[0]
    ).exists()
    fake.cut_after = None
    layers = LayerRange(0, 1)
    checkpoint = on_worker(source, layers)
    assert checkpoint.fingerprints(layers, sampled=True) == open_checkpoint(
        fake.folder
    ).fingerprints(layers, sampled=True)


def test_a_file_cut_short_on_the_disk_is_found(fake: FakeHub) -> None:
    source = hub_source(fake)
    checkpoint = on_worker(source, LayerRange(0, 1))
    path = (checkpoint.folder / SHARDS[0]).resolve()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        on_worker(source, LayerRange(0, 1))


# ------------------------------------------------------------------ what the hub may answer


@pytest.mark.parametrize(
    ("status", "error_code", "words"),
    [
        (404, "RepoNotFound", "has no model org/tiny-model.*spelling"),
        (401, "RepoNotFound", "hf auth login"),
        (401, "", "hf auth login"),
        (403, "", "hf auth login"),
        (403, "GatedRepo", "gated.*licence.*hf auth login"),
        (404, "RevisionNotFound", "no such revision"),
        (429, "", "HTTP 429"),
        (500, "", "HTTP 500.*try again"),
        (503, "", "HTTP 503.*try again"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    fake: FakeHub, status: int, error_code: str, words: str
) -> None:
    source = hub_source(fake)
    shutil.rmtree(constants.HF_HUB_CACHE)
    fake.status, fake.error_code = status, error_code
    with pytest.raises(CheckpointError, match=words):
        model_names.resolve_for_coordinator(NAME)
    with pytest.raises(CheckpointError, match=words):
        on_worker(source, LayerRange(0, 1))


def test_an_unknown_revision(fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="no such revision"):
        model_names.resolve_for_coordinator(f"{NAME}@v9")


def test_no_connection(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(hub, "_api", lambda: HfApi(endpoint=url, token=False))
        with pytest.raises(CheckpointUnavailable, match=r"cannot be fetched.*try again.*folder"):
            model_names.resolve_for_coordinator(NAME)


def test_offline_with_nothing_in_the_cache(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        model_names.resolve_for_coordinator(NAME)
    assert not isinstance(caught.value, CheckpointUnavailable)


def test_only_pickles(fake: FakeHub) -> None:
    for path in [*fake.folder.glob("*.safetensors"), fake.folder / INDEX_NAME]:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        model_names.resolve_for_coordinator(NAME)


def only(fake: FakeHub, *names: str, config: dict[str, Any] | None = None) -> None:
    """Let the repository hold these files, and perhaps a config.json, instead of its own."""
    shutil.rmtree(fake.folder)
    fake.folder.mkdir()
    for name in ("README.md", *names):
        (fake.folder / name).parent.mkdir(exist_ok=True)
        (fake.folder / name).write_text('{"base_model_name_or_path": "org/base"}')
    if config is not None:
        (fake.folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("names", "config", "words"),
    [
        (
            ["tiny.Q4_K_M.gguf", "tiny.Q8_0.gguf", "mmproj-tiny.gguf"],
            None,
            r"several models in GGUF: tiny\.Q4_K_M\.gguf, tiny\.Q8_0\.gguf\. Give one",
        ),
        (["tiny.Q4_K_M.gguf"], CONFIG, r"tiny\.Q4_K_M\.gguf is no GGUF file"),
        (["adapter_config.json", "adapter_model.safetensors"], None, "LoRA adapter for 'org/base'"),
        (["model_index.json", "unet/config.json"], None, "diffusers"),
        (["onnx/model.onnx"], CONFIG, "in the folder onnx"),
        (["consolidated.safetensors", "params.json"], None, "publisher's own format"),
        ([], CONFIG, "no weights"),
        ([], None, r"no config\.json"),
        (["model.safetensors"], CONFIG | {"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ],
)
def test_a_repository_in_another_format(
    fake: FakeHub, names: list[str], config: dict[str, Any] | None, words: str
) -> None:
    only(fake, *names, config=config)
    with pytest.raises(CheckpointError, match=words):
        model_names.resolve_for_coordinator(NAME)


def test_an_index_that_names_a_file_that_the_hub_lacks(fake: FakeHub) -> None:
    (fake.folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"index of org/tiny-model names a file.*revision"):
        model_names.resolve_for_coordinator(NAME)


@pytest.mark.parametrize("file", ["../../evil.safetensors", "*", "pytorch_model.bin"])
def test_an_index_that_names_other_files(fake: FakeHub, file: str) -> None:
    source = ModelSource(kind="hub", name=NAME, revision=COMMIT)
    (fake.folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError):
        on_worker(source, LayerRange(0, 1))
    assert "pytorch_model.bin" not in fake.bodies


@pytest.mark.parametrize(
    ("code", "words", "passes"),
    [
        (errno.ENOSPC, "disk is full.*HF_HOME", True),
        (errno.EIO, "HF_HOME", True),
        (errno.EACCES, "HF_HOME", False),
    ],
)
def test_a_disk_that_takes_nothing(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, code: int, words: str, passes: bool
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, "injected", "/somewhere")

    monkeypatch.setattr(HfApi, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_names.resolve_for_coordinator(NAME)
    assert isinstance(caught.value, CheckpointUnavailable) is passes


def test_no_config(fake: FakeHub) -> None:
    (fake.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_names.resolve_for_coordinator(NAME)
