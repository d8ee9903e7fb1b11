"""Says where weights of MLX belong that are stacked otherwise than in a model of transformers.

MLX keeps the experts of a layer in three stacks; in transformers, gates and ups are one.
"""

import re

from distributed_llm.worker.model.quantized.targets import Target

_STACK = re.compile(r"^(?P<path>.+)\.switch_mlp\.(?P<part>gate|up|down)_proj\.weight$")


def mlx_target(name: str) -> Target | None:
    """Return what becomes of a weight if it is a stack of experts as MLX keeps them, else None."""
    match = _STACK.match(name)
    if match is None:
        return None
    if match["part"] == "down":
        return Target(f"{match['path']}.experts.down_proj")
    return Target(
        f"{match['path']}.experts.gate_up_proj", piece=0 if match["part"] == "gate" else 1
    )
