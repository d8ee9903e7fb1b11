"""Models of encoder and decoder as stages hold them: with the layers of both in one list.

The model is transformers' own. While it is loaded its layers are in `PATH`, the encoder's first, as
those of a decoder alone are in one list; so they are read, shared, packed and dropped in the same
way. Then each stack gets those of its layers back that the stage has, and both get the matrix by
which they embed.
"""

from collections.abc import Container, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from distributed_llm.common.encoder_decoders import BIASED, PATH
from distributed_llm.worker.model.stacks.modules import buckets_of, replace_forwards
from distributed_llm.worker.model.stacks.positions import (
    ComputedPositions,
    RelativeBias,
    use_packed_positions,
)

Part = Literal["encoder", "decoder"]

_TABLE = "relative_attention_bias"
_LOOKS_AHEAD = "T5Gemma2SelfAttention"
"""Attention whose window is as large as said with what it sees before a token and after it."""

_BESIDE = "eoi_embedding"
"""What T5Gemma 2 embeds the end of a picture by."""

_HEAD_BIAS = "final_logits_bias"


def join_stacks(model: PreTrainedModel) -> None:
    """Put the layers of both stacks of a model into one list, and have them compute packed steps.

    Args:
        model: whole, without weights.
    """
    _keep_text(model)
    shared = _shared_embedding(model)
    joined: list[nn.Module] = []
    for part in ("encoder", "decoder"):
        stack = stack_of(model, part)
        path, layers = _layers_of(stack)
        for layer in layers:
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    cast(Any, module).layer_idx = len(joined)
            joined.append(layer)
        _mark(layers, part)
        _take_table(stack, layers)
        setattr(stack, path, nn.ModuleList())
        positions = getattr(stack, "embed_positions", None)
        if positions is not None:
            cast(Any, stack).embed_positions = use_packed_positions(positions)
        if shared is not None:
            cast(Any, stack).embed_tokens = nn.Identity()
    setattr(model, PATH, nn.ModuleList(joined))
    in_text = "encoder.text_model.embed_tokens"
    model.all_tied_weights_keys = {
        name: source if shared is None else source.replace(in_text, "shared")
        for name, source in model.all_tied_weights_keys.items()
        if shared is None or "embed_tokens" not in name
    }
    replace_forwards(model)


def _keep_text(model: PreTrainedModel) -> None:
    """Put the text model of an encoder that reads pictures too in its place."""
    inner = cast(Any, getattr(model, "model", None))
    text = getattr(getattr(inner, "encoder", None), "text_model", None)
    if text is not None:
        inner.encoder, inner.shared = text, text.embed_tokens


def link_stacks(model: PreTrainedModel, num_encoder_layers: int, device: torch.device) -> None:
    """Give each stack the layers of it that a stage has, and the matrix by which it embeds.

    Args:
        model: loaded, with the layers of the stage.
        num_encoder_layers: how many of these are the encoder's.
        device: that it computes on.
    """
    layers = cast(nn.ModuleList, model.get_submodule(PATH))
    shared = _shared_embedding(model)
    parts = {"encoder": layers[:num_encoder_layers], "decoder": layers[num_encoder_layers:]}
    for part, own in parts.items():
        stack = stack_of(model, cast(Part, part))
        path, _ = _layers_of(stack)
        setattr(stack, path, nn.ModuleList(own))
        if hasattr(stack.config, "layer_types"):
            stack.config.layer_types = [cast(Any, layer).attention_type for layer in own]
        if shared is not None:
            cast(Any, stack).embed_tokens = shared
        for module in stack.modules():
            if isinstance(module, ComputedPositions):
                module.device = device
        _give_biases(stack, own)


def drop_unread(model: PreTrainedModel, *, unless_in: Container[str]) -> None:
    """Drop what is no matrix of the head: its bias, and what is embedded beside the matrix.

    Files without a bias mean that there is none, and stages that do not embed tokens may have the
    matrix all the same.

    Args:
        model: of a stage, without weights.
        unless_in: names of what the stage reads outside the layers.
    """
    if _HEAD_BIAS in model._buffers and _HEAD_BIAS not in unless_in:
        del model._buffers[_HEAD_BIAS]
        setattr(model, _HEAD_BIAS, 0.0)
    shared = _shared_embedding(model)
    if hasattr(shared, _BESIDE) and f"model.shared.{_BESIDE}" not in unless_in:
        del cast(nn.Module, shared)._parameters[_BESIDE]
        setattr(shared, _BESIDE, torch.empty(0))  # transformers initialises it


def stack_of(model: PreTrainedModel, part: Part) -> PreTrainedModel:
    """Return the encoder or the decoder of a model."""
    found = model.get_encoder() if part == "encoder" else cast(Any, model).get_decoder()
    return cast(PreTrainedModel, found)


def _layers_of(stack: nn.Module) -> tuple[str, nn.ModuleList]:
    path = "block" if hasattr(stack, "block") else "layers"
    return path, cast(nn.ModuleList, getattr(stack, path))


def _shared_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the matrix by which both stacks embed; None if each has its own."""
    for holder in (model, getattr(model, "model", None)):
        if isinstance(shared := getattr(holder, "shared", None), nn.Module):
            return shared
    return None


def _mark(layers: nn.ModuleList, part: Part) -> None:
    """Tell the attention of layers what their queries see."""
    for layer in layers:
        for name, module in layer.named_modules():
            if type(module).__name__.endswith("Attention") and not _is_wrapper(module):
                across = "cross" in name or "encoder_attn" in name or "EncDec" in name
                of_stack = "source" if part == "encoder" else "answer"
                if "Merged" in type(module).__name__:
                    of_stack = "merged"
                cast(Any, module).attends = "across" if across else of_stack
                window = getattr(module, "sliding_window", None)
                if window and type(module).__name__ == _LOOKS_AHEAD:
                    cast(Any, module).reach = ((window + 1) // 2 - 1, window // 2)


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is a part of T5's layers that holds attention and a norm."""
    return hasattr(module, "SelfAttention") or hasattr(module, "EncDecAttention")


def _take_table(stack: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Take the biases of relative positions out of the first layer, if others share them."""
    if stack.config.model_type not in BIASED:
        return
    first = next(_biased(layers[:1]))
    setattr(stack, _TABLE, getattr(first, _TABLE))
    delattr(first, _TABLE)
    first.has_relative_attention_bias = False


def _biased(layers: Iterable[nn.Module]) -> Iterator[Any]:
    """Yield the attention of layers that adds biases of relative positions."""
    for layer in layers:
        for module in layer.modules():
            if hasattr(module, "has_relative_attention_bias") and module.attends != "across":
                yield module


def _give_biases(stack: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Have the attention of layers add the biases of relative positions, if the model has any."""
    of_stack: RelativeBias | None = None
    for module in _biased(layers):
        if (table := getattr(module, _TABLE, None)) is not None:
            module.bias = RelativeBias(table, buckets_of(module))
            continue
        of_stack = of_stack or RelativeBias(getattr(stack, _TABLE), buckets_of(module))
        module.bias = of_stack
