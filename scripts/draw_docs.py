"""Draws the state tables into docs/states.md, and the tree of modules into docs/architecture.md.

Run it after a table or the first line of a module has changed:

.venv/bin/python scripts/draw_docs.py
"""

import ast
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from distributed_llm.common.states import StateTable
from distributed_llm.coordinator.cluster.departures import DEPARTURE_STATES
from distributed_llm.coordinator.cluster.move import MOVE_STATES
from distributed_llm.coordinator.cluster.worker import WORKER_STATES
from distributed_llm.coordinator.requests.answer_states import ANSWER_STATES
from distributed_llm.coordinator.serving.pipeline import PIPELINE_STATES
from distributed_llm.coordinator.trust.conduct import CONDUCT_STATES
from distributed_llm.up.supervisor import UP_STATES
from distributed_llm.weights.fetching.tensor import TENSOR_STATES
from distributed_llm.worker.session.agent_states import AGENT_STATES
from distributed_llm.worker.session.epoch_stage import STAGE_STATES
from distributed_llm.worker.session.kv_move import KV_MOVE_STATES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distributed_llm"
STATES = ROOT / "docs" / "states.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree of modules: begin -->", "<!-- tree of modules: end -->"
_WIDTH = 24

TABLES: dict[str, StateTable[Any, Any]] = {
    "coordinator/serving/pipeline.py": PIPELINE_STATES,
    "coordinator/cluster/worker.py": WORKER_STATES,
    "coordinator/cluster/move.py": MOVE_STATES,
    "coordinator/cluster/departures.py": DEPARTURE_STATES,
    "coordinator/requests/answer_states.py": ANSWER_STATES,
    "coordinator/trust/conduct.py": CONDUCT_STATES,
    "worker/session/agent_states.py": AGENT_STATES,
    "worker/session/epoch_stage.py": STAGE_STATES,
    "worker/session/kv_move.py": KV_MOVE_STATES,
    "weights/fetching/tensor.py": TENSOR_STATES,
    "up/supervisor.py": UP_STATES,
}
"""By the module that holds them."""

HEAD = """# States

Drawn from the tables in the code by `scripts/draw_docs.py`; a test holds the two together. What
is not in a table raises `IllegalTransition`.
"""


# ------------------------------------------------------------------ states


def states() -> str:
    """Return docs/states.md."""
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


# ------------------------------------------------------------------ modules


def architecture() -> str:
    """Return docs/architecture.md with the tree of modules of now."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tree = "\n".join(_lines(PACKAGE, ""))
    return f"{before}{BEGIN}\n```\n{tree}\n```\n{END}{after}"


def _lines(folder: Path, indent: str) -> Iterator[str]:
    """Yield a line for each module and folder below, in the order of imports where one is set."""
    order = _order().get(_name(folder), [])
    paths = [path for path in folder.iterdir() if path.suffix == ".py" or _is_package(path)]

    def rank(path: Path) -> tuple[int, bool, str]:
        place = order.index(path.stem) if path.stem in order else len(order)
        return place, path.is_dir(), path.stem

    for path in sorted(paths, key=rank):
        if path.name == "__init__.py":
            continue
        module = path / "__init__.py" if path.is_dir() else path
        name = f"{indent}{path.name}{'/' * path.is_dir()}"
        yield f"{name:{_WIDTH}} {_first_line(module)}"
        if path.is_dir():
            yield from _lines(path, indent + "  ")


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").exists()


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts)


def _first_line(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(" Pure.")


def _order() -> dict[str, list[str]]:
    """Return the names in each package from the top of its imports to the bottom."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    order: dict[str, list[str]] = {}
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            names = [n.strip() for layer in contract["layers"] for n in layer.split("|")]
            package = contract.get("containers", ["distributed_llm"])[0]
            order[package] = [name.removeprefix("distributed_llm.") for name in names]
    return order


if __name__ == "__main__":
    STATES.write_text(states(), encoding="utf-8")
    ARCHITECTURE.write_text(architecture(), encoding="utf-8")
