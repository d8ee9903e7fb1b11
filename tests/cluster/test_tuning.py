"""A short tuning with real processes: figures, agreement, and settings that a coordinator takes."""

from pathlib import Path

from benchmarks.tuning.recommendation import recommend
from benchmarks.tuning.search import Step
from benchmarks.tuning.tuned_file import tuned_text
from benchmarks.tuning.tuning_run import Hands, Wishes, tune
from benchmarks.tuning.workbench import LocalWorker
from distributed_llm.common.config import load_settings


def test_configurations_are_run_checked_and_compared(tmp_path: Path) -> None:
    steps: list[Step] = []
    wishes = Wishes(
        model="",
        quick=True,
        values={"strategy": ["memory", "even"], "max_batch_tokens": [512], "subsets": []},
        loads=(1, 3),
        prompt_tokens=8,
        new_tokens=6,
        rounds=1,
        limit_s=None,
        goal="throughput",
        command="",
    )
    workers = tuple(LocalWorker(name, {"threads": "1"}) for name in ("pc", "old"))
    tuned = tune(wishes, Hands(workers, 2), on_step=steps.append, on_wait=lambda there, of: None)
    assert [(step.number, step.planned) for step in steps if step.outcome] == [(1, 2), (2, 2)]
    assert [one.failure for one in tuned.outcomes] == ["", ""]
    assert len({run.answers for one in tuned.outcomes for run in one.runs}) == 1
    for one in tuned.outcomes:
        assert {name for name, _ in one.runs[0].stages} == {"pc", "old"}
        assert set(one.loads) == {1, 3}
        for figures in one.loads.values():
            assert figures.tokens_per_s > 0
            assert 0 < figures.first_token_s < figures.answer_s
            assert 0 < figures.gap_p50_s <= figures.gap_p99_s
        share = one.loads[1].outside_share
        assert share is not None
        assert 0 < share < 1
    pick = recommend(tuned.outcomes, "throughput", model_dtype=tuned.model_dtype)
    path = tmp_path / "tuned.yaml"
    path.write_text(tuned_text(pick, [], tuned.provenance, tuned.extra))
    settings = load_settings(path, environment={}, overrides={}).coordinator
    assert settings.strategy == pick.outcome.configuration.strategy
