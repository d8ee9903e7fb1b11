"""Times of day: who looks at them, and what becomes of a cluster whose clocks are wrong."""

import ast
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from distributed_llm.common.messages import (
    CreateToken,
    Enrol,
    Enrolled,
    Refused,
    ToCoordinator,
    ToNextWorker,
    ToPreviousWorker,
    ToWorker,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from tests.unit.keyed_world import KeyedWorld, Raw, key
from tests.unit.simulation import LONG, finish

PACKAGE = Path(__file__).parents[2] / "distributed_llm"
HOUR_S = 3600.0

MAY_LOOK = {
    "api/openai/answer_head.py": "tells when an answer was made",
    "api/openai/models.py": "tells when a model was made",
    "api/openai/responses/routes.py": "tells when a response was made",
    "api/register.py": "tells when a request began",
    "common/gguf_files.py": "keeps the texts of GGUF files that were opened last",
    "console.py": "shows how long ago a machine enrolled",
    "coordinator/serve.py": "notes when the user of the coordinator was enrolled",
    "weights/cache/content_cache.py": "notes when weights were used last",
    "coordinator/service.py": "gives the clock to `Access`, for the end of tokens",
}


def looks(path: Path) -> bool:
    """Return whether a module asks for the time of day."""
    return any(
        (
            isinstance(node, ast.Attribute)
            and (node.attr in ("time_ns", "utcnow", "today", "fromtimestamp"))
        )
        or (
            isinstance(node, ast.Attribute)
            and node.attr == "time"
            and isinstance(node.value, ast.Name)
            and node.value.id == "time"
        )
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def test_no_decision_asks_what_time_of_day_it_is() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if looks(path)}
    assert found == set(MAY_LOOK)


def test_no_machine_tells_another_the_time_of_day() -> None:
    """Limits travel as seconds from now; clocks of two machines are never compared."""
    for union in (ToCoordinator, ToWorker, ToNextWorker, ToPreviousWorker):
        for kind in get_args(union):
            names = [field.name for field in msgspec.structs.fields(kind)]
            assert not [name for name in names if name.endswith("_at")], kind


@pytest.mark.parametrize("hours", [-1.0, 1.0, -24 * 365.0])
def test_a_clock_that_steps_back_changes_nothing_for_who_is_enrolled(hours: float) -> None:
    """Nor does one that steps ahead, in the middle of an answer."""
    world = KeyedWorld()
    workers = world.serving(3)
    answer = world.client().submit(LONG, SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert world.run(lambda: len(answer.token_ids) >= 3)
    world.time_of_day += hours * HOUR_S
    finish(world, answer)
    assert [worker.num_sessions for worker in workers] == [1, 1, 1]
    assert world.turned_away == 0
    late = world.worker("late")  # who is enrolled already may still come
    assert world.run(lambda: late.worker_id == "late", for_s=5.0)


@pytest.mark.parametrize(("hours", "good"), [(-1.0, True), (0.9, True), (1.1, False)])
def test_a_token_ends_by_the_clock_of_the_coordinator(hours: float, good: bool) -> None:
    world = KeyedWorld()
    create = CreateToken(key=key(900), role=Role.CLIENT, uses=1, lifetime_s=HOUR_S)
    assert world.admin.say(create).code == ""
    world.time_of_day += hours * HOUR_S
    said = Raw(world, key(900)).say(Enrol(key=key(901), name="pc"))
    if good:
        assert isinstance(said, Enrolled)
    else:
        assert isinstance(said, Refused)
        assert "This token expired 6 min ago." in said.message
