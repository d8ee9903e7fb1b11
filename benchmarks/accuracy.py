"""What few bits cost in accuracy: the built-in model's perplexity on stories it never saw.

    python -m benchmarks.accuracy [--stories 200]

The stories are those of the model's card: drawn by `scripts/story_grammar.py` from a random stream
of their own. Linear layers, but for the head, get the kernels that a worker's large weights have,
so inputs become integers where those make them such; a worker would compute weights as small as
this model's exactly. Embedding and head stay. KV cache in 8 bits is measured with a worker's own
attention and cache.
"""

import argparse
import copy
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import print_table
from distributed_llm.common.kv_dtypes import KVDtype
from distributed_llm.common.types import SequenceId
from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.model.attention import ATTENTION_NAME
from distributed_llm.worker.model.packed_step import PackedSlice, PackedStep, running
from distributed_llm.worker.model.quantized import linear
from distributed_llm.worker.model.quantized.linear import QuantLinear
from distributed_llm.worker.model.quantized.quantize import quantized

_ROOT = Path(__file__).parent.parent
_MODEL = _ROOT / "distributed_llm/builtin_model"
_HELD_OUT = "held out 1"
"""The random stream of the model's card: seed 1."""


def held_out_stories(count: int) -> list[Tensor]:
    """Return the token ids [1, tokens] of stories that the model was not trained on."""
    sys.path.append(str(_ROOT / "scripts"))
    try:
        tell = importlib.import_module("story_grammar").tell
    finally:
        sys.path.remove(str(_ROOT / "scripts"))
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    draw = Random(_HELD_OUT)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [tokenizer(tell(draw).text, add_special_tokens=False).input_ids for _ in range(count)]
    return [torch.tensor([[bos, *ids, eos]]) for ids in texts]


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return the built-in model."""
    return AutoModelForCausalLM.from_pretrained(_MODEL, dtype=dtype).train(False)


def with_integers(model: Any, form: WeightForm) -> Any:
    """Return a copy of `model` whose linear layers, but for the head, have weights of `form`.

    They are computed by the kernels of large weights, however small they are.
    """
    model = copy.deepcopy(model)
    with patch.object(linear, "is_worth_it", lambda _: True):
        _replace_layers(model, form)
    return model


def _replace_layers(model: Any, form: WeightForm) -> None:
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            weight = quantized(module.weight.detach(), form)
            made = QuantLinear.of(weight, module.bias, module.weight.dtype)
            setattr(model.model.get_submodule(parent), attribute, made)


class Cached:
    """A model that computes with a worker's attention, over a worker's KV cache.

    Args:
        model: from transformers; gets our attention.
        kv_dtype: how keys and values are kept.
        chunk: tokens of a step.
    """

    def __init__(self, model: Any, kv_dtype: KVDtype, chunk: int = 512) -> None:
        self._model, self._kv_dtype, self._chunk = model, kv_dtype, chunk
        model.set_attn_implementation(ATTENTION_NAME)

    def __call__(self, input_ids: Tensor) -> Any:
        """Return an object with the logits, [1, tokens, vocabulary]."""
        layers, tokens = self._model.config.num_hidden_layers, input_ids.shape[1]
        cache, number = KVCache(layers, kv_dtype=self._kv_dtype), SequenceId(0)
        logits = []
        for start in range(0, tokens, self._chunk):
            stop = min(start + self._chunk, tokens)
            ids = input_ids[:, start:stop]
            cache.begin(number, start, as_token_ids(ids[0].tolist()))
            part = PackedSlice(number, start, 0, stop - start)
            with running(PackedStep(cache, 0, (part,), [0] * layers)):
                positions = torch.arange(start, stop)[None]
                made = self._model(input_ids=ids, position_ids=positions, use_cache=False)
            cache.commit(number, stop)
            logits.append(made.logits)
        return SimpleNamespace(logits=torch.cat(logits, dim=1))


@torch.inference_mode()
def loss(model: Any, stories: Sequence[Tensor]) -> float:
    """Return nats per token."""
    total, tokens = 0.0, 0
    for ids in stories:
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


def main() -> None:
    """Measure all forms and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stories", type=int, default=200)
    stories = held_out_stories(parser.parse_args().stories)
    rows = []
    exact = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(dtype)
        base = loss(model, stories)
        exact = exact or base
        rows.append((f"{dtype}", base, "", f"{_more(base, exact):+.3f} %"))
        for form in (INT8, *(WeightForm(4, group) for group in INT4_GROUPS)):
            own = loss(with_integers(model, form), stories)
            more, than_exact = f"{_more(own, base):+.3f} %", f"{_more(own, exact):+.3f} %"
            rows.append((f"{dtype}, {form}", own, more, than_exact))
        for kv_dtype in get_args(KVDtype):
            own = loss(Cached(model, kv_dtype), stories)
            more, than_exact = f"{_more(own, base):+.3f} %", f"{_more(own, exact):+.3f} %"
            rows.append((f"{dtype}, KV cache {kv_dtype}", own, more, than_exact))
    head = ("layers", "nats per token", "perplexity against the same type", "against float32")
    print(f"{len(stories)} stories, {sum(ids.shape[1] - 1 for ids in stories)} tokens")
    print_table(head, [(name, f"{nats:.5f}", *more) for name, nats, *more in rows])


def _more(nats: float, than: float) -> float:
    """Return by how many percent the perplexity is higher."""
    return 100 * (math.exp(nats - than) - 1)


if __name__ == "__main__":
    main()
