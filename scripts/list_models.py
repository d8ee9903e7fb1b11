"""Writes docs/models.md, and the list of models in README.md.

Run it after a table of `common/architectures.py` or `known_models.toml` has changed:

.venv/bin/python scripts/list_models.py
"""

import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distributed_llm.common.architectures import VERIFIED, why_refused
from distributed_llm.common.encoder_decoders import ENCODER_DECODERS
from distributed_llm.common.text_config import text_config

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "scripts" / "known_models.toml"
MODELS, README = ROOT / "docs" / "models.md", ROOT / "README.md"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
_WIDTH = 110
TRIED = "tried when first used"
BOTH = "yes, encoder and decoder"
TEXT = "text yes; pictures and sound no"
UNTESTED = "text untested; pictures and sound no"
WHOLES = frozenset(
    {
        *("aya_vision", "gemma3", "gemma3n", "gemma4", "glm4v", "glm4v_moe", "idefics3"),
        *("internvl", "llama4", "llava"),
        *("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl"),
        "qwen4_exp",
        *("qwen3_vl_moe", "glm_ocr", "minimax_m3_vl", "phi4_multimodal"),
    }
)
"""Model types for pictures as well, of which tests hold the text against transformers."""

_TOLD_BY_CLASSES = (
    *("is_encoder_decoder", "is_decoder", "use_bidirectional_attention", "attention_chunk_size"),
    *("index_topk", "index_n_heads", "sparse_attention_config"),
)
"""Values that classes of transformers' configurations have by themselves, and reasons look at."""

_PARTS = ("text_config", "vision_config", "audio_config")

HEAD = """# Models

Made by `scripts/list_models.py` from the tables in `common/architectures.py` and the names in
`scripts/known_models.toml`; a test holds them together. Below are all {all} model types by which
transformers makes text, and some for pictures as well; {verified} of the {all} are split.

- **yes**: a test holds a small model of the type, split into one to three stages, against
  transformers: the same tokens in float32, greedy and sampled, for texts of different lengths,
  computed in chunks, and sharing a prefix.
- **{both}**: likewise, in one to five stages; what the encoder reads is computed once.
- **text yes**: of a model for pictures or sound as well, the text model is read, planned and split;
  **text untested**: likewise, but no test has files of the type.
- **no**: refused before anything is loaded, with this reason.
- **{tried}**: a small random model of the type is run whole and split before a worker
  serves it, and the type is refused if a token differs.

What a config.json says may be a reason as well, whatever the type: attention that chooses
positions, say. Rotary positions that change with the longest text of a batch (longrope, dynamic)
are those of the longest text that is served, for all texts. Code that comes with a checkpoint
(`auto_map`) is never run: types that transformers has are run by its own code, others are refused.
Layers and modules that predict several tokens at once (multi-token prediction) are left out.
"""


def families() -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return checkpoints that people know of each model type, by family; and README's families."""
    known = tomllib.loads(KNOWN.read_text(encoding="utf-8"))
    in_readme: list[str] = known.pop("in_readme")
    listed = {name for types in known.values() for name in types}
    if lacking := set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - listed:
        raise SystemExit(f"{KNOWN} lacks {sorted(lacking)}")
    return known, in_readme


def state_of(model_type: str) -> str:
    """Return "yes", "no: " with the reason, or that the type is tried when it is first used."""
    if model_type in ENCODER_DECODERS:
        return BOTH
    reason = why_refused({"model_type": model_type})
    if model_type in VERIFIED:
        return "yes" if reason is None else f"if config.json says `is_decoder`; else no: {reason}"
    if reason is not None:
        return f"no: {reason}"
    kind = CONFIG_MAPPING[model_type]
    parts: dict[str, Any] = {part: {} for part in _PARTS if part in kind.sub_configs}
    config = text_config({"model_type": model_type, **parts})
    if config["model_type"] != model_type:
        reason = why_refused(config)
        return (TEXT if model_type in WHOLES else UNTESTED) if reason is None else f"no: {reason}"
    told: dict[str, Any] = {name: getattr(kind, name, None) for name in _TOLD_BY_CLASSES}
    reason = why_refused({**told, "model_type": model_type})
    return TRIED if reason is None else f"no: {reason}"


def models() -> str:
    """Return docs/models.md."""
    count = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    states = map(state_of, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    verified = sum(not state.startswith(("no: ", TRIED, UNTESTED)) for state in states)
    parts = [HEAD.format(all=count, verified=verified, tried=TRIED, both=BOTH)]
    for family, types in families()[0].items():
        parts.append(f"\n## {family}\n\n| type | such as | split |\n|---|---|---|\n")
        parts += (f"| `{name}` | {names} | {state_of(name)} |\n" for name, names in types.items())
    return "".join(parts)


def readme() -> str:
    """Return README.md with the list of the models that most people use."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    known, in_readme = families()
    lines = [_line(family, known[family]) for family in in_readme]
    return f"{before}{BEGIN}\n{''.join(lines)}{END}{after}"


def _line(family: str, types: Mapping[str, str]) -> str:
    split, untested, refused = (
        ", ".join(_names(types, states)) for states in (("yes", TEXT), (UNTESTED, TRIED), ("no: ",))
    )
    line = f"- **{family}**: {split or 'none'}"
    line += f"; untested: {untested}" if untested else ""
    line += f"; not {refused}" if refused else ""
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def _names(types: Mapping[str, str], states: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of the types whose state begins with one of these."""
    for name, names in types.items():
        state = state_of(name)
        if state.startswith(states) and not names.startswith(
            ("text part", "drafts", "models like")
        ):
            yield f"text of {names}" if state in (TEXT, UNTESTED) else names


if __name__ == "__main__":
    MODELS.write_text(models(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
