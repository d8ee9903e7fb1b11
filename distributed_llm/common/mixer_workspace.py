"""The memory that layers with a state of their own take while they compute, from config.json.

Their mixers are transformers' own. They compute a chunk of a text in pieces of a fixed length, all
at once, and the single tokens of all sequences as a batch. The factors were measured.
"""

from distributed_llm.common.layer_states import (
    DELTA_NETS,
    MAMBA,
    MAMBA2,
    Config,
    MixerSizes,
    mixer_sizes,
    xlstm_widths,
)
from distributed_llm.common.model_sizes import head_sizes, positive
from distributed_llm.common.tensors import ITEM_BYTES, DtypeName

_FLOAT = ITEM_BYTES["float32"]
"""Bytes of most numbers that recurrences are computed with."""

_SCANNED = 3
"""Mamba: numbers of a state for every token: how it fades, and what is added, in two steps."""

_PIECE = 64
"""Tokens that delta nets compute at once."""

_PIECE_OF_MAMBA2 = 256
"""The same of Mamba 2 if config.json does not tell."""

_RECURRENT_COPIES = 10
"""RecurrentGemma: numbers of the width of a recurrence for every token."""

_RWKV_COPIES = 6
"""RWKV: numbers of that width for every token; and as many hidden states."""

_XLSTM_COPIES, _XLSTM_PAIRS = 8, 6
"""xLSTM: numbers of all keys and values for every token; and of each pair of tokens of a piece."""

_ZAYA_COPIES = 7
"""ZAYA: numbers of queries, keys and values for every token."""

_STEP_COPIES = 7
"""Copies of the states of a batch of single tokens: joined, taken, fading, added to, and read."""

_STEP_COPIES_OF_DELTA = 5
"""The same where states are changed in place."""


def mixer_bytes(config: Config, dtype: DtypeName, *, tokens: int, rows: int) -> int:
    """Return what a layer with a state takes at most in a step, beside its states and the residual.

    Args:
        config: of the model.
        dtype: of the computation.
        tokens: of a step at most.
        rows: sequences of a step at most.

    Raises:
        CheckpointError: a size is not there, or no possible number.
    """
    mixer = mixer_sizes(config)
    if mixer is None:
        return 0
    made_anew = config["model_type"] in MAMBA | MAMBA2 | {"rwkv"}
    copies = _STEP_COPIES if made_anew else _STEP_COPIES_OF_DELTA
    single = min(rows, tokens) * copies * mixer.recurrent * _FLOAT
    return max(single, _chunk_bytes(config, mixer, tokens, ITEM_BYTES[dtype]))


def _chunk_bytes(config: Config, mixer: MixerSizes, tokens: int, item_bytes: int) -> int:
    """Return what a chunk of `tokens` takes; 0 where that is no more than attention would take."""
    heads, keys, values = mixer.heads, mixer.heads * mixer.key_dim, mixer.heads * mixer.value_dim
    match config["model_type"]:
        case kind if kind in MAMBA:
            columns = values * (8 * item_bytes + 3 * _FLOAT)
            return tokens * (_SCANNED * mixer.recurrent * _FLOAT + columns)
        case kind if kind in MAMBA2:
            names = [n for n in ("chunk_size", "mamba_chunk_size") if config.get(n) is not None]
            piece = min(tokens, positive(config, *names) if names else _PIECE_OF_MAMBA2)
            numbers = 3 * heads * piece + 5 * keys + 10 * values
        case kind if kind in DELTA_NETS:
            piece, numbers = _PIECE, 2 * heads * _PIECE + 7 * keys + 8 * values
        case (
            "kimi_linear" | "bailing_hybrid"
        ):  # fades by a number per key, so products of keys cannot be shared
            piece, numbers = _PIECE, (3 * _PIECE + 12) * keys
        case "recurrent_gemma":
            return tokens * values * _RECURRENT_COPIES * item_bytes
        case "rwkv":  # its window is two hidden states
            return tokens * _RWKV_COPIES * (values + mixer.window // 2) * item_bytes
        case "zaya":
            sizes = head_sizes(config)
            numbers = (sizes.heads + 2 * sizes.kv_heads) * sizes.key_dim
            return tokens * _ZAYA_COPIES * numbers * item_bytes
        case "xlstm":
            piece = min(tokens, positive({"chunk_size": _PIECE, **config}, "chunk_size"))
            numbers = _XLSTM_COPIES * sum(xlstm_widths(config)) + _XLSTM_PAIRS * mixer.heads * piece
            states = 2 * (tokens // piece + 1) * mixer.recurrent
            return (tokens * numbers + states) * _FLOAT
        case _:
            return 0
    padded = -(-tokens // piece) * piece
    return padded * numbers * _FLOAT
