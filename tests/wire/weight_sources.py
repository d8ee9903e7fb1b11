"""A model whose bytes are known, and machines that give its weights over real sockets."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from distributed_llm.common import codec
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.keys import KeyPair, PublicKey
from distributed_llm.common.messages import (
    Chunk,
    ModelSource,
    ReadChunk,
    ToReader,
    WeightRequest,
)
from distributed_llm.common.other_formats import INDEX_NAME
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Door, Login, Router, new_key_pair
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetch import Fetch, Origin
from distributed_llm.weights.giving.desk import Desk
from distributed_llm.weights.giving.giver import Giver
from distributed_llm.weights.giving.library import Library
from distributed_llm.weights.giving.shelf import Place, Shelf
from distributed_llm.worker.compute.finding import _checkpoint_of
from tests.unit.cache_parts import content, name_of

NUM_LAYERS = 4
WHOLE = LayerRange(0, NUM_LAYERS)
MATRIX_BYTES = 640 << 10
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 8,
    "vocab_size": 16,
    "num_attention_heads": 2,
}


def write_model(folder: Path) -> Path:
    """Write four layers in three files: 0 | 1, 2 | 3 and the head.

    One tensor is empty, and all layers have the same bias.
    """
    folder.mkdir(parents=True)

    def layer(i: int) -> dict[str, Any]:
        name = f"model.layers.{i}.mlp"
        matrix = np.frombuffer(content(MATRIX_BYTES, i), np.float16).reshape(8, -1)
        return {f"{name}.weight": matrix, f"{name}.bias": np.ones(100, np.float32)}

    table = np.frombuffer(content(1000, 100), np.float16)
    files = [
        {"model.embed_tokens.weight": table} | layer(0),
        layer(1) | {"model.layers.2.mlp.none": np.zeros((0, 8), np.float16)} | layer(2),
        layer(3) | {"model.norm.weight": table[:8], "lm_head.weight": table[::-1].copy()},
    ]
    for name, tensors in zip(SHARDS, files, strict=True):
        save_file(tensors, folder / name)
    weight_map = {t: name for name, ts in zip(SHARDS, files, strict=True) for t in ts}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@dataclass
class Model:
    """A model on the coordinator's disk, and what safetensors itself reads there.

    Attributes:
        source: as the coordinator names it; the worker has no such folder.
        bytes_of: of each tensor, by name.
    """

    checkpoint: Checkpoint
    source: ModelSource
    bytes_of: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in self.checkpoint.folder.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as content:
                for name in content.keys():  # noqa: SIM118 it is no dict
                    self.bytes_of[name] = content.get_tensor(name).tobytes()

    def names(self, layers: LayerRange = WHOLE) -> list[str]:
        return [info.name for info in self.checkpoint.tensors_of(layers)]

    def nbytes(self, *ranges: LayerRange) -> int:
        """Bytes of the tensors of these layers; equal ones count once."""
        named = {name for layers in ranges or (WHOLE,) for name in self.names(layers)}
        return sum(map(len, {self.bytes_of[name] for name in named}))

    def shelf(self, layers: LayerRange = WHOLE) -> Shelf:
        """Return a shelf with these layers, of a worker that has read the coordinator's files."""
        shelf = Shelf()
        for info in self.checkpoint.tensors_of(layers):
            place = Place(self.checkpoint.folder / info.file, info.offset, info.nbytes)
            shelf.put(name_of(self.bytes_of[info.name]), place)
        return shelf

    def library(
        self, folder: Path, file: Callable[[str], Path] | None = None, source: Any = None
    ) -> Library:
        """Return the weights as the coordinator has them.

        Args:
            folder: for digests.
            file: returns where a file is.
            source: another one.
        """

        def here(name: str, on_bytes: Callable[[int], None]) -> Path:
            return file(name) if file else self.checkpoint.folder / name

        return Library(source or self.source, self.checkpoint, here, Shelf(), folder)


def model_in(folder: Path) -> Model:
    source = ModelSource(kind="folder", name="/a folder of another machine")
    return Model(open_checkpoint(write_model(folder)), source)


Change = Callable[[ToReader, tuple[Frame, ...]], tuple[ToReader, tuple[Frame, ...]] | None]


class Giving:
    """A machine that gives weights: the coordinator with a library, or a worker with a shelf.

    Args:
        has: what it gives.
        keys: of it; None without keys.
        bind: to listen on.
        max_bytes_per_s: that it gives.

    Attributes:
        address: "HOST:PORT".
        asked: all requests for chunks.
        given_bytes: that it sent, by SHA-256.
        change: returns what is sent in place of an answer; None sends nothing.
        before: called before each answer is sent.
        admitted: whether keys of others are let in.
        peers: that have asked.
    """

    def __init__(
        self,
        has: Library | Shelf,
        keys: KeyPair | None = None,
        bind: str = "127.0.0.1:0",
        max_bytes_per_s: int | None = None,
    ) -> None:
        self.keys = keys
        self.asked: list[ReadChunk] = []
        self.given_bytes: Counter[str] = Counter()
        self.change: Change = lambda message, frames: (message, frames)
        self.before: Callable[[ToReader], None] = lambda message: None
        self.admitted = True
        self.refused = 0
        self.peers: list[PeerId] = []
        self._held: list[tuple[PeerId, ToReader, tuple[Frame, ...]]] | None = None
        self._open = True
        self._router = Router(
            bind,
            self._on_message,
            lambda: None,
            door=Door(keys, self._admits) if keys else None,
        )
        self.address = self._router.address
        self._desk: Desk | Giver
        if isinstance(has, Library):
            self._desk = Desk(has, self._answer, max_bytes_per_s=max_bytes_per_s)
        else:
            self._desk = Giver(has, self._answer, max_bytes_per_s=max_bytes_per_s)

    @property
    def total_bytes(self) -> int:
        """Bytes that it sent."""
        return self.given_bytes.total()

    def hold(self) -> None:
        """Send no chunks for now."""
        self._held = []

    def release(self) -> None:
        """Send all chunks that were held back."""
        held, self._held = self._held or [], None
        for answer in held:
            self._answer(*answer)

    def send(self, message: ToReader, frames: tuple[Frame, ...] = ()) -> None:
        """Send what nobody asked for."""
        self._router.send(self.peers[-1], codec.encode(message, frames))

    def send_raw(self, frames: list[Frame]) -> None:
        """Send what may be no message."""
        self._router.send(self.peers[-1], frames)

    def cut(self) -> None:
        """Lose all connections, and take no others."""
        if self._open:
            self._open = False
            self._router.close(linger_ms=0)

    def close(self) -> None:
        """End, as a process does that is killed."""
        self.cut()
        self._desk.close()

    def _admits(self, key: PublicKey) -> bool:
        self.refused += not self.admitted
        return self.admitted

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        if peer not in self.peers:
            self.peers.append(peer)
        message, _ = codec.to_coordinator.decode(frames)
        assert isinstance(message, WeightRequest)
        if isinstance(message, ReadChunk):
            self.asked.append(message)
        if isinstance(self._desk, Desk):
            self._desk.asked(peer, message)
        else:
            assert isinstance(message, ReadChunk), "only the coordinator is asked such things"
            self._desk.asked(peer, message)

    def _answer(self, peer: PeerId, message: ToReader, frames: tuple[Frame, ...]) -> None:
        if self._held is not None and isinstance(message, Chunk):
            self._held.append((peer, message, frames))
            return
        self.before(message)
        answer = self.change(message, frames) if self._open else None
        if answer is None:
            return
        message, frames = answer
        if isinstance(message, Chunk):
            self.given_bytes[message.sha256] += len(frames[0])
        self._router.send(peer, codec.encode(message, frames))


@dataclass
class Reader:
    """A worker that fetches.

    Attributes:
        coordinator: that it asks.
        peers: other workers, with the layers that they are said to have.
        keys: of it; None without keys.
        wanted: whether the weights are still wanted.
        on_bytes: number of bytes that were counted as progress.
    """

    model: Model
    cache: ContentCache
    coordinator: Giving
    peers: Mapping[str, tuple[Giving, LayerRange]] = field(default_factory=dict)
    keys: KeyPair | None = None
    max_bytes_per_s: int | None = None
    wanted: bool = True
    on_bytes: int = 0
    shelf: Shelf = field(default_factory=Shelf)

    def origin(self, one: Giving, *layers: LayerRange) -> Origin:
        login = Login(one.keys.public, self.keys) if one.keys and self.keys else None
        return Origin((one.address,), login, layers)

    def _count(self, nbytes: int) -> None:
        self.on_bytes += nbytes

    @contextmanager
    def fetching(
        self, layers: LayerRange = WHOLE, source: ModelSource | None = None
    ) -> Iterator[Fetch]:
        """Fetch the weights of some layers."""
        fetch = Fetch(
            source or self.model.source,
            layers,
            coordinator=self.origin(self.coordinator),
            peers={name: self.origin(one, held) for name, (one, held) in self.peers.items()},
            cache=self.cache,
            shelf=self.shelf,
            max_bytes_per_s=self.max_bytes_per_s,
            on_bytes=self._count,
            is_wanted=lambda: self.wanted,
        )
        try:
            yield fetch
        finally:
            fetch.close()
            assert not fetch._thread.is_alive()

    async def load(self, layers: LayerRange = WHOLE) -> int:
        """Fetch these layers, check each byte, and return how many came from others."""
        with self.fetching(layers) as fetch:
            await self.begun(fetch)
            await self.check(fetch, self.model.names(layers))
            return fetch.fetched_bytes

    async def begun(self, fetch: Fetch) -> None:
        """Begin to fetch once it is known what the model consists of."""
        fetch.begin(_checkpoint_of(await asyncio.to_thread(fetch.model)))

    async def check(self, fetch: Fetch, names: Iterable[str]) -> None:
        """Wait for these tensors, and check each byte."""
        for name in names:
            place = await asyncio.to_thread(fetch.wait_for, name)
            end = place.offset + place.nbytes
            assert place.file.read_bytes()[place.offset : end] == self.model.bytes_of[name], name

    def written_bytes(self) -> int:
        """Bytes in the cache, in complete entries and begun ones."""
        files = (*self.cache.folder.glob("tensors/*/*"), *self.cache.folder.glob("partial/*"))
        return sum(os.stat(file).st_size for file in files)


def key_pair(use_keys: bool) -> KeyPair | None:
    """Return new keys, or None."""
    return new_key_pair() if use_keys else None
