"""Draws the state tables of the package into docs/states.md. Run it after a table has changed.

.venv/bin/python scripts/draw_states.py
"""

from enum import Enum
from pathlib import Path
from typing import Any

from distributed_llm.common.states import StateTable
from distributed_llm.coordinator.cluster.departures import DEPARTURE_STATES
from distributed_llm.coordinator.cluster.move import MOVE_STATES
from distributed_llm.coordinator.cluster.registry import WORKER_STATES
from distributed_llm.worker.session.agent import AGENT_STATES
from distributed_llm.worker.session.epoch_stage import STAGE_STATES
from distributed_llm.worker.session.kv_handover import HANDOVER_STATES

TARGET = Path(__file__).parents[1] / "docs" / "states.md"

TABLES: dict[str, StateTable[Any, Any]] = {
    "coordinator/cluster/registry.py": WORKER_STATES,
    "coordinator/cluster/move.py": MOVE_STATES,
    "coordinator/cluster/departures.py": DEPARTURE_STATES,
    "worker/session/agent.py": AGENT_STATES,
    "worker/session/epoch_stage.py": STAGE_STATES,
    "worker/session/kv_handover.py": HANDOVER_STATES,
}
"""By the module that holds them."""

HEAD = """# States

Drawn from the tables in the code by `scripts/draw_states.py`; a test holds the two together. What
is not in a table raises `IllegalTransition`.
"""


def document() -> str:
    """Return the whole document."""
    parts = [HEAD]
    for module, table in TABLES.items():
        parts.append(f"\n## {table.thing[0].upper()}{table.thing[1:]}\n\n`{module}`\n")
        meanings = _meanings(type(table.initial))
        if meanings:
            parts.append(f"\n{meanings}\n")
        parts.append(f"\n```mermaid\n{table.mermaid()}\n```\n")
    return "".join(parts)


def _meanings(states: type[Enum]) -> str:
    """Return what the states mean, as far as their class says."""
    lines = (states.__doc__ or "").split("Attributes:")[1:]
    return "\n".join(
        f"- {line.strip()}" for part in lines for line in part.strip().splitlines() if line.strip()
    )


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
