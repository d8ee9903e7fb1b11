"""`dllm cache`: what it shows and deletes, and what it says when it is not told what to do."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distributed_llm.cli import app
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import ConfigError
from distributed_llm.weights.cache.content_cache import ContentCache
from tests.unit.cache_parts import begun, content, files, name_of, put

FIRST, SECOND, THIRD = content(2048, 1), content(1024, 2), content(512, 3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ContentCache:
    """The cache of this user, in which there is nothing yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return ContentCache(folder, None)


@pytest.fixture
def filled(cache: ContentCache) -> ContentCache:
    """With two models, of which one is complete, and something else."""
    cache.note_model("one", {name_of(data): len(data) for data in (FIRST, SECOND)})
    cache.note_model("two", {name_of(data): len(data) for data in (SECOND, content(1024, 9))})
    for data in (FIRST, SECOND, THIRD):
        put(cache, data)
    with begun(cache, content(1024, 9)) as partial:
        partial.write(content(1024, 9)[:300])
    return cache


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments])


def test_nothing_is_kept(cache: ContentCache) -> None:
    assert run("list").stdout == f"0 bytes in {cache.folder}\n"
    done = run("prune", "--all")
    assert done.exit_code == 0
    assert done.stderr == f"0 bytes are free again in {cache.folder}\n"
    assert not cache.folder.exists()


def test_what_is_kept_is_listed(filled: ContentCache) -> None:
    done = run("list")
    assert done.exit_code == 0
    *rows, total = [re.sub("  +", "  ", line.strip()) for line in done.stdout.splitlines()]
    assert rows[0] == "model  kept  of  last used"
    assert {re.sub(r"[0-9.]+ m?s ago", "now", row) for row in rows[1:]} == {
        "one  3.0 KiB  3.0 KiB  now",
        "two  1.0 KiB  2.0 KiB  now",
    }
    assert total == (
        f"3.8 KiB in {filled.folder} (512 bytes of no known model, 300 bytes not complete yet)"
    )


def test_what_is_kept_is_listed_as_json(filled: ContentCache) -> None:
    document = json.loads(run("list", "--json").stdout)
    models = {model.pop("name"): model for model in document.pop("models")}
    assert {name: model["kept_bytes"] for name, model in models.items()} == {
        "one": 3072,
        "two": 1024,
    }
    assert all(set(one) == {"kept_bytes", "total_bytes", "used_at"} for one in models.values())
    assert document == {
        "folder": str(filled.folder),
        "total_bytes": 3884,
        "unknown_bytes": 512,
        "partial_bytes": 300,
    }


@pytest.mark.parametrize(
    "options", [(), ("--all", "--to", "1KiB"), ("--model", "one", "--all"), ("--to", "0", "--all")]
)
def test_prune_wants_to_be_told_what(filled: ContentCache, options: tuple[str, ...]) -> None:
    done = run("prune", *options)
    assert done.exit_code == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    assert "--to SIZE" in said
    assert "--model NAME" in said
    assert "--all" in said
    assert filled.contents().total_bytes == 3884


@pytest.mark.parametrize("size", ["", "much", "-1", "1 GB/s"])
def test_prune_wants_a_size(filled: ContentCache, size: str) -> None:
    done = run("prune", "--to", size)
    assert done.exit_code == 2
    assert "not a size" in done.stderr
    assert filled.contents().total_bytes == 3884


def test_prune_to_a_size(filled: ContentCache) -> None:
    done = run("prune", "--to", "2KiB")
    assert done.exit_code == 0
    assert done.stderr == f"2.0 KiB are free again in {filled.folder}\n"
    assert filled.contents().total_bytes == 1836
    assert not filled.has(name_of(FIRST), 2048), "it was used least lately"


def test_prune_a_model(filled: ContentCache) -> None:
    done = run("prune", "--model", "one")
    assert done.exit_code == 0
    assert done.stderr == f"2.0 KiB are free again in {filled.folder}\n"
    assert filled.has(name_of(SECOND), 1024), "the other one has it as well"
    again = run("prune", "--model", "one")
    assert isinstance(again.exception, ConfigError)
    assert again.exception.exit_code == 2


def test_prune_everything_but_what_is_written_now(filled: ContentCache) -> None:
    with begun(filled, content(1024, 9)):
        done = run("prune", "--all")
    assert done.exit_code == 0
    assert done.stderr == (
        f"3.5 KiB are free again in {filled.folder}\n"
        "300 bytes stay: they are being fetched or read, or this user may not delete them\n"
    )
    assert run("prune", "--all").exit_code == 0
    assert files(filled.folder) == []
