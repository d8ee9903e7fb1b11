"""The list of models in the docs is that of the tables, and says of every type what is true."""

import runpy
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distributed_llm.common.architectures import VERIFIED
from distributed_llm.common.encoder_decoders import ENCODER_DECODERS
from tests.wholes import WHOLES

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "list_models.py"))


@pytest.mark.parametrize(("path", "made"), [("docs/models.md", "models"), ("README.md", "readme")])
def test_it_is_up_to_date(path: str, made: str) -> None:
    """If not: run scripts/list_models.py."""
    assert (ROOT / path).read_text(encoding="utf-8") == SCRIPT[made]()


def test_every_type_is_split_or_refused_or_tried() -> None:
    states = {name: SCRIPT["state_of"](name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    split = {name for name, state in states.items() if not state.startswith(("no", "tried", "te"))}
    assert split == (VERIFIED | ENCODER_DECODERS) & states.keys()
    on_condition = {name for name in split if not states[name].startswith("yes")}
    assert on_condition == {
        *("bert", "bert-generation", "electra", "ernie", "megatron-bert", "rembert")
    }
    assert states["gemma3"] == SCRIPT["TEXT"]
    tested = {name.partition(" of ")[0] for name in WHOLES}
    assert SCRIPT["WHOLES"] == tested | {"phi4_multimodal", "gemma3n"}
    assert states["qwen3"] == "yes"
    assert states["bart"] == "yes, encoder and decoder"
    assert "pictures or sound" in states["whisper"]
    assert "chooses some of the positions" in states["deepseek_v4"]


def test_only_what_is_refused_is_behind_not() -> None:
    line = SCRIPT["_line"]
    types = {"qwen3": "Qwen3", "gemma4_unified": "12B", "xlnet": "XLNet"}
    assert line("Some", types) == "- **Some**: Qwen3; untested: text of 12B; not XLNet\n"
    assert line("Some", {"gemma3n": "E2B"}) == "- **Some**: text of E2B\n"
