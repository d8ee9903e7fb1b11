"""llama.cpp in a child process of `benchmarks.engine`: it times what it is asked on stdin.

    PYTHON benchmarks/llamacpp_peer.py MODEL.gguf [--threads 2]
    PYTHON benchmarks/llamacpp_peer.py MODEL.gguf --quantize Q4_0 --output OTHER.gguf

PYTHON is an interpreter that has `llama-cpp-python`, built for this machine
(`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`). It needs
nothing else of this project. The questions and answers are those of `benchmarks.peers`.
"""

import argparse
import ctypes
import json
import random
import sys
import time
from collections.abc import Sequence

import llama_cpp  # type: ignore[import-not-found] # it has a venv of its own
import numpy as np

_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
_MOST_TOKENS = 512
"""Tokens that are read at a time, as a coordinator does."""

_MOST_SEQUENCES = 16


class Engine:
    """A model with a KV cache for all sequences of a question."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = _MOST_TOKENS
        params.n_seq_max = _MOST_SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(_MOST_TOKENS, 0, 1)

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, object]:
        """Read the prompts and decode greedily; return seconds of both and the tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.perf_counter()
        firsts = [-1] * len(prompts)
        parts = [(i, p, token) for i, text in enumerate(prompts) for p, token in enumerate(text)]
        for start in range(0, len(parts), _MOST_TOKENS):
            part = parts[start : start + _MOST_TOKENS]
            last = [p == len(prompts[i]) - 1 for i, p, _ in part]
            ends = [i for (i, _, _), end in zip(part, last, strict=True) if end]
            for i, token in zip(ends, self._decode(part, last), strict=True):
                firsts[i] = token
        read = time.perf_counter()
        tokens = [[token] for token in firsts]
        for step in range(new_tokens - 1):
            part = [(i, len(prompts[i]) + step, own[-1]) for i, own in enumerate(tokens)]
            for own, token in zip(tokens, self._decode(part, [True] * len(part)), strict=True):
                own.append(token)
        done = time.perf_counter()
        return {"prefill_s": read - began, "decode_s": done - read, "tokens": tokens}

    def _decode(self, parts: Sequence[tuple[int, int, int]], ends: Sequence[bool]) -> list[int]:
        """Compute (sequence, position, token); return the likeliest token after each end."""
        batch = self._batch
        batch.n_tokens = len(parts)
        for row, ((sequence, position, token), end) in enumerate(zip(parts, ends, strict=True)):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, end
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp failed to compute a batch.")
        rows = [row for row, end in enumerate(ends) if end]
        return [int(np.argmax(self._logits(row))) for row in rows]

    def _logits(self, row: int) -> np.ndarray:
        values = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(values, (self._vocab_size,))


def quantize(path: str, output: str, name: str) -> None:
    """Write the model again, with llama.cpp's own choice of types for a file of that name."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _TYPES[name]
    if llama_cpp.llama_model_quantize(path.encode(), output.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot make {name} of {path}.")


def serve(path: str, threads: int) -> None:
    """Load, tell how long it took, then answer each line of stdin."""
    began = time.perf_counter()
    engine = Engine(path, threads, context=_MOST_SEQUENCES * 512)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    draw = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = asked.get("prompts") or [
            draw.choices(range(3, 31_000), k=asked["prompt_tokens"])
            for _ in range(asked["sequences"])
        ]
        print(json.dumps(engine.answer(prompts, asked["new_tokens"])), flush=True)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """Print nothing of what llama.cpp tells."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", choices=_TYPES)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    if arguments.quantize:
        quantize(arguments.model, arguments.output, arguments.quantize)
    else:
        serve(arguments.model, arguments.threads)
