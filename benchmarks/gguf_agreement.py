"""Compare what llama.cpp and transformers make of the same tiny models, written as GGUF files.

    python -m benchmarks.gguf_agreement PYTHON [CASE...]

PYTHON is an interpreter that has `llama-cpp-python` (see `llamacpp_peer.py`). The tests write the
same files, and compare what is served of them with transformers: this shows that llama.cpp
understands them as it does its own converter's.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import build_model
from tests.gguf_cases import CASES, WRITTEN
from tests.gguf_models import write_gguf

_PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38]
_VOCABULARY = 320
_ALLOWED = 2e-3
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "gemma3n": {"intermediate_size": 8192},  # it takes deviations as of a sample
    "command-r, larger": {"num_layers": 64},  # by which it knows that one
    "deepseek2, lite": {"num_layers": 27},  # likewise
    "phi3": {"sliding_window": None},  # it leaves the window out
}
"""What a case needs for llama.cpp to compute the same."""

_SCRIPT = Path(__file__).with_name("llamacpp_logits.py")


def distance(python: str, case: str, folder: Path) -> float | str:
    """Return how far log-probabilities are apart at most, or what llama.cpp says instead."""
    family, settings = CASES[case]
    settings = {"num_layers": 4, **settings, **_NEEDED.get(case, {})}
    model = build_model(family, vocab_size=_VOCABULARY, **settings)
    file = write_gguf(folder / "model.gguf", model, **WRITTEN.get(case, {}))
    command = [python, str(_SCRIPT), str(file), *map(str, _PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip() or f"exit code {done.returncode}"
    theirs = torch.tensor(json.loads(done.stdout)).log_softmax(-1)
    with torch.inference_mode():
        ours = model(torch.tensor([_PROMPT])).logits[0, -1].log_softmax(-1)
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("python")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        for one in given.cases:
            found = distance(given.python, one, Path(made))
            agrees = isinstance(found, float) and found < _ALLOWED
            print(f"{one:24} {'agrees' if agrees else 'DIFFERS'}  {found}", flush=True)
