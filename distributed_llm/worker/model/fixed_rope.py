"""Makes rotary positions the same for every text, where transformers lets them change.

Two kinds depend on the longest text of a batch, so that an answer would depend on who else asks:
longrope, which has factors for short and for long texts, and dynamic scaling, whose base grows with
the text. Both are fixed here as for a text as long as the longest that is served.
"""

from typing import Any

from transformers import PretrainedConfig

_FACTORS = ("short_factor", "long_factor")
_PAIRS = (_FACTORS, ("short_mscale", "long_mscale"))

_AS_SHORT = {"phimoe": (_FACTORS,)}
"""Of which model types transformers takes what is for short texts, whatever their length."""


def fix_rope(config: PretrainedConfig, context_length: int) -> None:
    """Change the rotary positions of a configuration to those of texts of `context_length`.

    Args:
        config: as transformers has made it of a config.json.
        context_length: positions of the longest text that is served.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    for one in (parameters, *parameters.values()):
        if not isinstance(one, dict):
            continue
        if one.get("rope_type") == "longrope":
            is_long = context_length > one["original_max_position_embeddings"]
            for pair in _PAIRS:
                _fix_pair(one, pair, is_long and pair not in _AS_SHORT.get(config.model_type, ()))
        elif one.get("rope_type") == "dynamic" and not one.get("alpha"):  # with it, it is fixed
            _fix_base(one, config, context_length)


def _fix_pair(parameters: dict[str, Any], pair: tuple[str, str], is_long: bool) -> None:
    """Make what longrope has for short and for long texts the same."""
    if all(name in parameters for name in pair):
        chosen = parameters[pair[is_long]]
        parameters.update(dict.fromkeys(pair, chosen))


def _fix_base(parameters: dict[str, Any], config: Any, context_length: int) -> None:
    """Replace dynamic scaling by the base that it has for one length."""
    trained: int = config.max_position_embeddings
    factor = parameters.pop("factor")
    heads = config.hidden_size // config.num_attention_heads
    share = parameters.get("partial_rotary_factor", 1.0)
    dim = int((getattr(config, "head_dim", None) or heads) * share)
    longer = factor * max(context_length, trained) / trained - (factor - 1)
    parameters["rope_theta"] *= longer ** (dim / (dim - 2))
    parameters["rope_type"] = parameters["type"] = "default"
