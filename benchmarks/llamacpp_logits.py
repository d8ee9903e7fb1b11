"""Print what llama.cpp makes of tokens: the logits after the last of them, as JSON.

    PYTHON benchmarks/llamacpp_logits.py MODEL.gguf 3 1 4 1 5

PYTHON is an interpreter that has `llama-cpp-python`, as for `llamacpp_peer.py`. It needs nothing
else of this project.
"""

import ctypes
import json
import sys

import llama_cpp  # type: ignore[import-not-found] # it has a venv of its own
import numpy as np

_ERROR = 4
"""Level of messages about errors, in llama.cpp."""


def logits(path: str, tokens: list[int]) -> list[float]:
    """Return the logits of the token that follows."""
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}.")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row], batch.logits[row] = token, row, row == len(tokens) - 1
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp failed to compute a batch.")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    values = llama_cpp.llama_get_logits_ith(context, len(tokens) - 1)
    return [float(value) for value in np.ctypeslib.as_array(values, (size,))]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _errors_alone(level: int, text: bytes, _data: object) -> None:
    if level >= _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    llama_cpp.llama_log_set(_errors_alone, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    print(json.dumps(logits(sys.argv[1], [int(token) for token in sys.argv[2:]])))
