"""Reads checkpoints on disk without torch: config, names and sizes of tensors, digests.

Only Hugging Face checkpoints with safetensors, and GGUF files (`gguf_files`), are read, and nothing
in them is executed.
"""

import hashlib
import json
import logging
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distributed_llm.common import model_sizes as sizes
from distributed_llm.common.encoder_decoders import (
    StackNames,
    is_encoder_decoder,
    of_decoder,
    of_stack,
    stays_float32,
)
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.common.fingerprints import fingerprints_of
from distributed_llm.common.form_in_memory import bytes_in_memory, form_in_memory
from distributed_llm.common.idle_experts import is_of_idle_expert
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.layer_sharing import kv_lenders
from distributed_llm.common.layer_states import keeps_kv, state_bytes
from distributed_llm.common.model_files import TensorInfo, read_header
from distributed_llm.common.model_folder import listing, no_checkpoint, read_config
from distributed_llm.common.ngrams import follows_from_config
from distributed_llm.common.other_formats import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    quantized,
)
from distributed_llm.common.outer_weights import OuterWeights, lacks_head
from distributed_llm.common.schemes.parts import NotRead
from distributed_llm.common.schemes.reading import stored_weights
from distributed_llm.common.shared_blocks import block_sources, layer_of_block
from distributed_llm.common.stored_weights import StoredWeight
from distributed_llm.common.tensor_index import is_draft, tensors_by_index
from distributed_llm.common.tensors import DtypeName
from distributed_llm.common.text_config import PART_OF, TIED
from distributed_llm.common.text_names import LAYER_NAME, TextNames, layers_by_prefix, text_names
from distributed_llm.common.types import LayerRange
from distributed_llm.common.weight_forms import Quantize, WeightForm

logger = logging.getLogger(__name__)

_KV_NAME = re.compile(r"^(self_attn\.[kv]_(proj|norm)|attn_[kv](_norm)?)\.")
_TRANSPOSED_MATRICES = frozenset({"gpt2", "openai-gpt"})
"""Types of models that keep matrices as [in_features, out_features]."""

_TORCH_DTYPES: dict[str, DtypeName] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk.

    Args:
        folder: holds config.json, the tokenizer and the safetensors files.
        config: the content of config.json; if it describes other parts as well, of its text model.
        tensors: every tensor of the text model, by its name in the files.
        files: the folder of the files with tensors, if it is another one.
        served_context: positions that texts may have where it is served; None: as many as the
            model can.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Path | None = None
    served_context: int | None = None

    def limited_to(self, positions: int) -> "Checkpoint":
        """Return the checkpoint for texts of at most so many positions; 0: as many as it can."""
        if not positions or positions >= self.context_length:
            return self
        return replace(self, served_context=positions)

    def path_of(self, file: str) -> Path:
        """Return where the file `file` with tensors is."""
        return (self.files or self.folder) / file

    @property
    def place(self) -> Path:
        """Where people know it to be: its folder, or its first GGUF file."""
        files = sorted({tensor.file for tensor in self.tensors.values()}) if self.files else []
        return self.path_of(files[0]) if files else self.folder

    @property
    def described_by(self) -> str:
        """What tells of the model's sizes: config.json, or the metadata of a GGUF file."""
        return "its metadata" if self.files else CONFIG_NAME

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        """The model's class in transformers; empty if config.json names none."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in its tensors; what is tied counts once."""
        return sum(math.prod(w.shape) for w in self.weights.values() if not self.is_spare(w.name))

    @cached_property
    def _text(self) -> TextNames | StackNames:
        return _names_of(self.config, self.tensors)

    @property
    def stacks(self) -> StackNames | None:
        """How an encoder-decoder calls what it has; None: the model is a decoder alone."""
        return self._text if isinstance(self._text, StackNames) else None

    @cached_property
    def weights(self) -> Mapping[str, StoredWeight]:
        """Every weight of the files, by its name in the text model; some are of several tensors.

        Raises:
            CheckpointError: tensors are missing, or do not fit each other.
            UnsupportedModel: the weights are quantized in a way that is not known.
        """
        try:
            found = stored_weights(self.config, self.tensors)
        except NotRead as exc:
            raise UnsupportedModel(f"The model in {self.place} {quantized(str(exc))}") from None
        except CheckpointError as exc:
            raise CheckpointError(f"{self.place}: {exc}") from exc
        if not self._text.renames:
            return found
        named = [replace(weight, name=self._text.of(name)) for name, weight in found.items()]
        return {weight.name: weight for weight in named}

    @cached_property
    def num_layers(self) -> int:
        """Transformer layers of the model."""
        return sizes.num_layers(self.config)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers, with what travels beside them."""
        own = sizes.hidden_size(self.config) * sizes.streams(self.config)
        return own + sizes.width_beside(self.config)

    @property
    def source_size(self) -> int:
        """Width of the hidden states of what an encoder reads; without one, as `hidden_size`."""
        return sizes.source_size(self.config) * sizes.streams(self.config)

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids; all are below it."""
        return sizes.positive(of_decoder(self.config), "vocab_size")

    @cached_property
    def context_length(self) -> int:
        """Positions that a text may have in the model, or those served if these are fewer."""
        longest = sizes.context_length(self.config, attends=any(keeps_kv(self.config)))
        return longest if self.served_context is None else min(longest, self.served_context)

    @cached_property
    def dtype(self) -> DtypeName:
        """The dtype that the checkpoint was saved in."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str) and (known := named.removeprefix("torch.")) in _TORCH_DTYPES:
            return _TORCH_DTYPES[known]
        plain = (w.parts[""].dtype for w in self.weights.values() if w.scheme is None)
        kinds = [_TORCH_DTYPES[kind] for kind in plain if kind in _TORCH_DTYPES]
        return max(set(kinds), key=kinds.count, default="float32")

    def layer_kv_bytes(self, dtype: DtypeName, kv_dtype: KVDtype = "auto") -> tuple[int, ...]:
        """Return the bytes of KV cache that one position takes in each layer; 0: it keeps none."""
        kept = keeps_kv(self.config)
        if not any(kept):
            return (0,) * len(kept)
        attending = sizes.layer_kv_bytes(self.config, dtype, kv_dtype)
        return tuple(map(operator.mul, attending, kept))

    def layer_state_bytes(self, dtype: DtypeName) -> tuple[int, ...]:
        """Return the bytes of the state of one sequence in each layer; 0: it keeps none."""
        return state_bytes(self.config, dtype)

    @cached_property
    def layer_prefix(self) -> str:
        """The part of a tensor's name before the layer's number, such as "model.layers".

        Raises:
            CheckpointError: tensors of layers 0 to `num_layers` are missing.
        """
        if self._layer_prefix is not None:
            return self._layer_prefix
        layers = layers_by_prefix(map(self._text.of, self.tensors)).values()
        wanted = set(range(self.num_layers))
        best = max(layers, key=lambda numbers: len(numbers & wanted), default=set())
        count, layer, stack = of_stack(self.config, self.num_layers, min(wanted - best))
        raise CheckpointError(
            f"{self.place}: {self.described_by} promises {count} layers{stack}, but the files "
            f"have no tensors of layer {layer}{stack}. They are not all files of the model, "
            f"or {self.described_by} is another model's; compare them with the original."
        )

    @cached_property
    def _layer_prefix(self) -> str | None:
        wanted = set(range(self.num_layers))
        layers = layers_by_prefix(map(self._text.of, self.tensors))
        whole = (prefix for prefix, numbers in layers.items() if numbers >= wanted)
        return min(whole, key=lambda prefix: len(layers[prefix]), default=None)

    def is_spare(self, name: str) -> bool:
        """Return whether tensor `name` belongs to a layer beyond those that config.json names.

        Or to a module of its own that does what such layers do, or makes keys and values of a layer
        that reads those of another.

        Args:
            name: in the files, or in the text model.
        """
        match = LAYER_NAME.match(self._text.of(name))
        if is_draft(name):
            return True
        if match is None or match["prefix"] != self._layer_prefix:
            return False
        layer = int(match["layer"])
        if layer >= self.num_layers:
            return True
        if self.block_of(name) not in (None, self.block_sources[layer]):
            return True  # the same as the weights of its source
        if is_of_idle_expert(self.config, name):
            return True
        return self._lenders[layer] is not None and bool(_KV_NAME.search(match["rest"]))

    @cached_property
    def _lenders(self) -> tuple[int | None, ...]:
        return kv_lenders(self.config, self.num_layers)

    def layer_of(self, name: str) -> int | None:
        """Return the layer that tensor `name` belongs to, or None if it is outside the layers.

        Args:
            name: in the files, or in the text model.
        """
        if self.block_of(name) is not None:
            return None
        return self.layer_in(name)

    def layer_in(self, name: str) -> int | None:
        """Return the layer that the name of a tensor tells, though others may share it."""
        match = LAYER_NAME.match(self._text.of(name))
        return int(match["layer"]) if match and match["prefix"] == self.layer_prefix else None

    @cached_property
    def block_sources(self) -> tuple[int | None, ...]:
        """Of each layer the one that names its shared block; see `common.shared_blocks`."""
        return block_sources(self.config, self.num_layers)

    def block_of(self, name: str) -> int | None:
        """Return the layer that names the shared block of tensor `name`; None: it is of none."""
        return layer_of_block(self.config, name)

    @cached_property
    def outer(self) -> OuterWeights:
        """What its weights outside the layers are, and which stages use them."""
        names = map(self._text.of, self.tensors)
        return OuterWeights(self.config, self.num_layers, self.stacks, names, self.weights)

    def weights_of(self, layers: LayerRange) -> Iterator[StoredWeight]:
        """Yield the weights that a stage with `layers` needs.

        The first stage also needs the embeddings; the last one the final norm, the head and, if the
        head is tied to it, the token embedding. What makes inputs of layers, every stage needs.
        """
        outer = self.outer
        uses_tied = layers.stop == self.num_layers or outer.embeds(layers)
        for name, weight in self.weights.items():
            layer = self.layer_of(name)
            if layer is not None:
                if layers.start <= layer < layers.stop:
                    yield weight
            elif outer.is_used_by(layers, name) or (uses_tied and outer.is_tied(name)):
                yield weight

    def tensors_of(self, layers: LayerRange) -> Iterator[TensorInfo]:
        """Yield the tensors that make the weights that a stage with `layers` needs, each once."""
        weights = self.weights_of(layers)
        yield from dict.fromkeys(part for weight in weights for part in weight.parts.values())

    def form_of(self, weight: StoredWeight, quantize: Quantize) -> WeightForm | None:
        """Return the form that `weight` has in memory; None: floating-point numbers."""
        in_layers = self.layer_in(weight.name) is not None
        lies_along = in_layers and self.model_type not in _TRANSPOSED_MATRICES
        return form_in_memory(weight, in_layers=lies_along, quantize=quantize)

    def weight_bytes(self, weight: StoredWeight, dtype: DtypeName, quantize: Quantize) -> int:
        """Return the bytes that `weight` takes once it is loaded, floating point as `dtype`."""
        if dtype == "float16" and stays_float32(self.config, weight.name):
            return bytes_in_memory(weight, None, "float32")
        return bytes_in_memory(weight, self.form_of(weight, quantize), dtype)

    def fingerprints(self, layers: LayerRange, *, sampled: bool) -> dict[str, str]:
        """Return, by name, a fingerprint of each tensor that a stage with `layers` needs.

        Args:
            layers: of the stage.
            sampled: whether the files are read; see `fingerprints_of`.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return fingerprints_of(self.tensors_of(layers), self.path_of, sampled=sampled)

    def digest(self, layers: LayerRange, fingerprints: Mapping[str, str]) -> str:
        """Return a digest of config.json and the weights of `layers`. Reads no files.

        Args:
            fingerprints: of the tensors of `layers`, and perhaps of others.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(tensor.name for tensor in self.tensors_of(layers)):
            digest.update(fingerprints[name].encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`. Reads the headers of the files, not the weights.

    Raises:
        CheckpointError: with what is missing or broken and what to do about it.
    """
    config = read_config(folder)
    names = listing(folder)
    if SINGLE_NAME in names:  # as in transformers, whatever an index says
        tensors = read_header(folder, SINGLE_NAME)
    elif INDEX_NAME in names:
        tensors = tensors_by_index(folder, config, names)
    else:
        raise no_checkpoint(folder, names)
    return checkpoint_of(folder, config, tensors)


def checkpoint_of(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    files: Path | None = None,
) -> Checkpoint:
    """Return the checkpoint with those of these tensors that the model has.

    Some models come with layers beyond `num_hidden_layers`, which predict several tokens at once.
    Others are the text model of one for pictures or sound as well, whose other parts are left out.
    Layers that read keys and values of others may come with projections for their own. What follows
    from config.json is not read.

    Args:
        folder: of config.json, and of the files with tensors.
        config: content of config.json, as `read_config` returns it.
        tensors: all that the files hold.
        files: the folder of the files with tensors, if it is another one.

    Raises:
        CheckpointError: tensors are missing, or do not fit each other.
        UnsupportedModel: the weights are quantized in a way that is not known.
    """
    names = _names_of(config, tensors)
    of_text = {
        name: tensor
        for name, tensor in tensors.items()
        if names.holds(name) and not follows_from_config(name)
    }
    if PART_OF in config:
        config = {**config, TIED: lacks_head(map(names.of, of_text))}
    checkpoint = Checkpoint(folder, config, of_text, files)
    spare = {name for name in of_text if checkpoint.is_spare(name)}
    if not spare:
        return _checked(checkpoint)
    logger.warning(
        "%s: %d tensors of layers beyond the %d of config.json, or of keys and values that are "
        "never read, are left out, such as %s",
        *(folder, len(spare), checkpoint.num_layers, min(spare)),
    )
    kept = {name: tensor for name, tensor in of_text.items() if name not in spare}
    return _checked(Checkpoint(folder, config, kept, files))


def _names_of(config: Mapping[str, Any], tensors: Iterable[str]) -> TextNames | StackNames:
    """Return how the tensors of the model are called in the files, and in the model itself."""
    if is_encoder_decoder(config):
        return StackNames.of_files(config, tensors)
    return text_names(tensors, sizes.num_layers(config), is_part=PART_OF in config)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint, of whose weights it is known what they are."""
    _ = checkpoint.weights
    return checkpoint
