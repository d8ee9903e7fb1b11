"""Experts that pass states on as they are, as LongCat-Flash has some: they have no weights.

transformers has room for half of theirs all the same, and writes it into files. Pure.
"""

import re
from collections.abc import Mapping
from typing import Any

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def is_of_idle_expert(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a tensor is of an expert that makes no use of it."""
    if not config.get("zero_expert_num"):
        return False
    working, match = config.get("n_routed_experts"), _EXPERT.search(name)
    return match is not None and type(working) is int and int(match[1]) >= working
