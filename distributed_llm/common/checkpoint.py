"""Reads checkpoints on disk without torch: config, names and sizes of tensors, digests.

Only Hugging Face checkpoints with safetensors are read, and nothing in them is executed.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName
from distributed_llm.common.types import LayerRange

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_SAMPLE_BYTES = 4096
_MAX_JSON_BYTES = 64 * 1024 * 1024
_LAYER_NAME = re.compile(r"^(?P<prefix>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")
_EMBEDDING_NAME = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings\w*|project_in)(\.|$)")
_NEVER_TIED_NAME = re.compile(r"(^|\.)(wpe|embed_positions|project_in)\.")
_HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
_TORCH_DTYPES: dict[str, DtypeName] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        file: the safetensors file that holds it, inside the folder.
        dtype: safetensors' name ("BF16").
        offset: of its first byte in the file.
        nbytes: its size in the file, bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk.

    Args:
        folder: holds config.json and the safetensors files.
        config: the content of config.json.
        tensors: every tensor of the files, by its name in the checkpoint.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config["model_type"])

    @cached_property
    def num_layers(self) -> int:
        """Transformer layers of the model."""
        return _positive(self.config, "num_hidden_layers", "n_layer", "num_layers")

    @cached_property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers."""
        return _positive(self.config, "hidden_size", "n_embd")

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids; all are below it."""
        return _positive(self.config, "vocab_size")

    @cached_property
    def context_length(self) -> int:
        """Positions that the model can attend to."""
        names = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
        if not any(name in self.config for name in names):
            return 2048  # ALiBi models name no limit
        return _positive(self.config, *names)

    @cached_property
    def dtype(self) -> DtypeName:
        """The dtype that the checkpoint was saved in."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str) and named in _TORCH_DTYPES:
            return _TORCH_DTYPES[named]
        kinds = [_TORCH_DTYPES[t.dtype] for t in self.tensors.values() if t.dtype in _TORCH_DTYPES]
        return max(set(kinds), key=kinds.count, default="float32")

    def kv_bytes_per_token(self, dtype: DtypeName) -> int:
        """Return the bytes of KV cache that one position takes in one layer."""
        config = self.config
        heads = _positive(config, "num_attention_heads", "n_head")
        kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
        head_dim = config.get("head_dim") or self.hidden_size // heads
        return 2 * int(kv_heads) * int(head_dim) * (4 if dtype == "float32" else 2)

    @cached_property
    def layer_prefix(self) -> str:
        """The part of a tensor's name before the layer's number, such as "model.layers.".

        Raises:
            CheckpointError: the tensors are not those of layers 0 to `num_layers`.
        """
        layers: dict[str, set[int]] = {}
        for name in self.tensors:
            if match := _LAYER_NAME.match(name):
                layers.setdefault(match["prefix"], set()).add(int(match["layer"]))
        wanted = set(range(self.num_layers))
        for prefix, numbers in layers.items():
            if numbers == wanted:
                return prefix
        best = max(layers.values(), key=lambda numbers: len(numbers & wanted), default=set())
        missing = sorted(wanted - best)
        raise CheckpointError(
            f"{self.folder}: config.json promises {self.num_layers} layers, but the files have no "
            f"tensors of layer {missing[0] if missing else max(best)}. The checkpoint is "
            "incomplete or its config.json belongs to another model; download it again."
        )

    def layer_of(self, name: str) -> int | None:
        """Return the layer that tensor `name` belongs to, or None if it is outside the layers."""
        match = _LAYER_NAME.match(name)
        return int(match["layer"]) if match and match["prefix"] == self.layer_prefix else None

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the head uses the matrix of the embedding."""
        return not any(_HEAD_NAME.search(name) for name in self.tensors)

    def is_embedding(self, name: str) -> bool:
        """Return whether tensor `name`, outside the layers, is used before the first layer."""
        return _EMBEDDING_NAME.search(name) is not None and not _HEAD_NAME.search(name)

    def _is_tied(self, name: str) -> bool:
        return self.ties_embeddings and not _NEVER_TIED_NAME.search(name)

    def tensors_of(self, layers: LayerRange) -> Iterator[TensorInfo]:
        """Yield the tensors that a stage with `layers` needs.

        The first stage also needs the embeddings; the last one the final norm, the head and, if the
        head is tied to it, the token embedding.
        """
        first, last = layers.start == 0, layers.stop == self.num_layers
        for name, tensor in self.tensors.items():
            layer = self.layer_of(name)
            if layer is not None:
                if layers.start <= layer < layers.stop:
                    yield tensor
            elif self.is_embedding(name):
                if first or (last and self._is_tied(name)):
                    yield tensor
            elif last:
                yield tensor

    def bytes_in_memory(self, tensor: TensorInfo, dtype: DtypeName) -> int:
        """Return the bytes that `tensor` takes once it is loaded as `dtype`."""
        if tensor.dtype not in _TORCH_DTYPES:
            return tensor.nbytes
        return math.prod(tensor.shape) * ITEM_BYTES[dtype]

    def fingerprints(self, layers: LayerRange, *, sampled: bool) -> dict[str, str]:
        """Return, by name, a fingerprint of each tensor that a stage with `layers` needs.

        It covers dtype, shape and, if `sampled`, the first 4 KiB. It detects a wrong checkpoint,
        not a forged one.

        Raises:
            CheckpointError: a file cannot be read.
        """
        by_file: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors_of(layers):
            by_file.setdefault(tensor.file, []).append(tensor)
        prints: dict[str, str] = {}
        for name, tensors in by_file.items():
            samples = self._samples(name, tensors) if sampled else [b""] * len(tensors)
            for tensor, sample in zip(tensors, samples, strict=True):
                named = f"{tensor.name} {tensor.dtype} {tensor.shape} ".encode()
                prints[tensor.name] = hashlib.sha256(named + sample).hexdigest()
        return prints

    def digest(self, layers: LayerRange, fingerprints: Mapping[str, str]) -> str:
        """Return a digest of config.json and the weights of `layers`. Reads no files.

        Args:
            fingerprints: of the tensors of `layers`, and perhaps of others.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(tensor.name for tensor in self.tensors_of(layers)):
            digest.update(fingerprints[name].encode())
        return digest.hexdigest()

    def _samples(self, name: str, tensors: Iterable[TensorInfo]) -> list[bytes]:
        samples = []
        try:
            with open(self.folder / name, "rb") as file:
                for tensor in tensors:
                    file.seek(tensor.offset)
                    samples.append(file.read(min(_SAMPLE_BYTES, tensor.nbytes)))
        except OSError as exc:
            raise CheckpointError(f"{self.folder / name} cannot be read: {exc}.") from exc
        return samples


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`. Reads the headers of the files, not the weights.

    Raises:
        CheckpointError: with what is missing or broken and what to do about it.
    """
    config = read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for name in _weight_files(folder):
        tensors.update(read_header(folder, name))
    return Checkpoint(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json; of a multi-modal model, that of its text part.

    Raises:
        CheckpointError: there is no such file, or it is no config.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}. Give the path of a checkpoint folder, or a model id of "
            "the hub such as 'Qwen/Qwen3-0.6B'."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / 'config.json'} names no model_type. It is not the config.json of a "
            "Hugging Face model."
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder / 'config.json'} asks to run code of its own (auto_map). Code from "
            "checkpoints is never run; use a model whose architecture is part of transformers."
        )
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of generation_config.json, empty if there is none.

    Raises:
        CheckpointError: it is not JSON.
    """
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_JSON_BYTES} bytes.")
        content = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"There is no {path.name} in {path.parent}. Give the folder of a Hugging Face "
            "checkpoint (config.json, *.safetensors, tokenizer.json)."
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}.") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON ({exc}). Download it again.") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return content


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX_NAME).exists():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map. Download it again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_NAME} names the file {name!r}, which is not a safetensors "
                    "file in the same folder. Do not use this checkpoint."
                )
        return names
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when it "
            "is read. Convert it on a machine that you can afford to lose: AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder) writes safetensors."
        )
    raise CheckpointError(
        f"There is neither {SINGLE_NAME} nor {INDEX_NAME} in {folder}. Give the folder of a "
        "Hugging Face checkpoint with safetensors weights."
    )


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Return the tensors of the safetensors file `name` in `folder`, by their names.

    Raises:
        CheckpointError: it is missing or broken, or a name occurs twice.
    """
    path = folder / name
    try:
        with safe_open(path, framework="numpy"):  # checks everything but repeated names
            pass
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size), object_pairs_hook=_refuse_repeats)
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"There is no {name} in {folder}, which {INDEX_NAME} names. The download is "
            "incomplete; download it again."
        ) from exc
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({exc}). Download it again."
        ) from exc
    header.pop("__metadata__", None)
    return {
        tensor: TensorInfo(
            tensor,
            name,
            info["dtype"],
            tuple(info["shape"]),
            8 + size + info["data_offsets"][0],
            info["data_offsets"][1] - info["data_offsets"][0],
        )
        for tensor, info in header.items()
    }


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a tensor name occurs twice")
    return content


def _positive(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 < value < 2**31:
                raise CheckpointError(f"config.json has {name} = {value!r}; it must be above 0.")
            return value
    raise CheckpointError(
        f"config.json of the {config.get('model_type')!r} model has none of {', '.join(names)}; "
        "it is not the configuration of a decoder language model."
    )
