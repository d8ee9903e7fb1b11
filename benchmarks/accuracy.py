"""What integers cost in accuracy: the built-in model's perplexity on stories it never saw.

    python -m benchmarks.accuracy [--stories 200]

The stories are those of the model's card: drawn by `scripts/story_grammar.py` from a random stream
of their own. Linear layers, but for the head, get the kernels that a worker's large weights have,
so inputs become integers where those make them such; a worker would compute weights as small as
this model's exactly. Embedding and head stay.
"""

import argparse
import copy
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import print_table
from distributed_llm.common.weight_forms import INT4_GROUPS, INT8, WeightForm
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
    head = ("layers", "nats per token", "perplexity against the same type", "against float32")
    print(f"{len(stories)} stories, {sum(ids.shape[1] - 1 for ids in stories)} tokens")
    print_table(head, [(name, f"{nats:.5f}", *more) for name, nats, *more in rows])


def _more(nats: float, than: float) -> float:
    """Return by how many percent the perplexity is higher."""
    return 100 * (math.exp(nats - than) - 1)


if __name__ == "__main__":
    main()
