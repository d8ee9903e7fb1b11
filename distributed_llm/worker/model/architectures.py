"""Checks whether a model type that no test covers gives right results when it is split.

A small random model of the same architecture is run whole, by transformers alone, and split into
stages, by the code that serves, with sequences of different lengths. If tokens differ or anything
fails, the model is refused.
"""

import functools
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distributed_llm.common.architectures import check_architecture, has_tests, unsupported
from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint
from distributed_llm.common.messages import SequenceSlice
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import LayerRange, SequenceId
from distributed_llm.worker.kv.cache import as_token_ids
from distributed_llm.worker.model.empty_model import model_config, new_model, parameters_of
from distributed_llm.worker.model.layer_loading import without_progress_bars
from distributed_llm.worker.model.sampler import sample
from distributed_llm.worker.model.small_config import LONG_TEXT, shrink_config

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 200
"""Characters of what went wrong with a small model that are passed on."""

_NO_TOKENS = as_token_ids(())
_WEIGHT_STD = 0.15  # the usual 0.02 gives every token nearly the same logits
_PROMPTS = (
    tuple((37 * position + position**2) % 100 for position in range(LONG_TEXT)),
    (2, 7, 18, 28),
    (16, 18, 0, 33, 98, 87, 49),
)
_NEW_TOKENS = 6
# Sampled tokens reveal differences between logits that have the same maximum.
_SAMPLINGS = (Sampling(), *(Sampling(temperature=2.0, seed=seed) for seed in range(4)))


class Runnable(Protocol):
    """The part of a stage that the check uses."""

    def run(
        self, sequences: Sequence[SequenceSlice], token_ids: Tensor, hidden_states: Tensor | None
    ) -> Any:
        """Compute one step; see `Stage.run`."""


class Loader(Protocol):
    """A function that loads one stage; see `Stage.load_unchecked`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        layers: LayerRange,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Runnable:
        """Return the stage."""


def ensure_supported(checkpoint: Checkpoint, load: Loader) -> None:
    """Refuse a model that gives wrong results when it is split.

    Takes about a second for a model type that no test of this package covers.

    Args:
        checkpoint: of the model; only its config.json is read.
        load: loads the stages of the small model.

    Raises:
        UnsupportedModel: with the reason and what to do.
    """
    check_architecture(checkpoint.config)
    if not has_tests(checkpoint.config):
        parameters_of(checkpoint.config)  # raises if config.json is damaged
        check: Any = _self_check  # lru_cache is typed for hashable protocols only
        check(json.dumps(checkpoint.config, sort_keys=True), load)


@functools.lru_cache(maxsize=16)
def _self_check(config_json: str, load: Any) -> None:
    config = json.loads(config_json)
    logger.info(
        "no test covers the model type %r: trying a small model of it, whole and split",
        config["model_type"],
    )
    try:
        with tempfile.TemporaryDirectory(prefix="distributed_llm_check_") as folder:
            whole = _small_model(config)
            with without_progress_bars():
                whole.save_pretrained(folder)
            differing = _differing_tokens(whole, open_checkpoint(Path(folder)), load)
    except Exception as exc:  # what fails here would fail, or give wrong results, when serving
        said = str(exc)[:_SHOWN_CHARS].rstrip(".")
        why = f"no test covers it, and a small model of it cannot be run split ({said})"
        raise unsupported(config, why) from exc
    if differing:
        gave = f"a small model of it gave {differing} other tokens when it was split in two"
        raise unsupported(config, f"no test covers it, and {gave}")


def _small_model(config: Mapping[str, Any]) -> PreTrainedModel:
    small = model_config(shrink_config(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(small, torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=_WEIGHT_STD)
            else:
                parameter.data += _WEIGHT_STD * torch.randn_like(parameter)
    model.train(False)
    return model


def _differing_tokens(whole: PreTrainedModel, checkpoint: Checkpoint, load: Loader) -> int:
    """Return how many tokens the split model samples differently from the whole one."""
    middle, num_layers = checkpoint.num_layers // 2, checkpoint.num_layers
    stages = [
        load(checkpoint, layers, device=torch.device("cpu"), dtype=torch.float32)
        for layers in (LayerRange(0, middle), LayerRange(middle, num_layers))
    ]
    texts = [list(prompt) for prompt in _PROMPTS]
    done = [0] * len(texts)
    differing = 0
    for _ in range(_NEW_TOKENS):
        logits = torch.stack([_next_logits(whole, text) for text in texts])
        lengths = [len(text) for text in texts]
        for sampling in _SAMPLINGS:
            samplings = [sampling] * len(texts)
            expected = sample(logits, samplings, lengths, histories=[_NO_TOKENS] * len(texts))
            differing += int((expected != _step(stages, texts, done, sampling)).sum())
        done = lengths
        for text, row in zip(texts, logits, strict=True):
            text.append(int(row.argmax()))
    return differing


@torch.inference_mode()
def _next_logits(whole: PreTrainedModel, text: list[int]) -> Tensor:
    logits: Tensor = whole(input_ids=torch.tensor([text]), use_cache=False).logits
    return logits[0, -1]


def _step(
    stages: Sequence[Runnable], texts: list[list[int]], done: list[int], sampling: Sampling
) -> Tensor:
    sequences = [
        SequenceSlice(
            sequence_id=SequenceId(number),
            start=start,
            num_tokens=len(text) - start,
            sample=True,
            sampling=sampling,
        )
        for number, (text, start) in enumerate(zip(texts, done, strict=True))
    ]
    tokens = [token for text, start in zip(texts, done, strict=True) for token in text[start:]]
    token_ids, hidden_states = torch.tensor(tokens, dtype=torch.int32), None
    for stage in stages:
        output = stage.run(sequences, token_ids, hidden_states)
        hidden_states = output.hidden_states
    token_ids = output.token_ids
    assert isinstance(token_ids, Tensor)
    return token_ids
