"""What goes into a wheel: all of the package, with the files that are no modules."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distributed_llm"
COMPILED = {".c", ".h", ".so", ".pyd"}
"""What is compiled for the wheel, and what comes of it."""


def test_a_wheel_has_every_file_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = import_module("setuptools").Distribution({"script_name": "none"})
    distribution.parse_config_files(["pyproject.toml"])
    distribution.include_package_data = False  # what an earlier build has found
    build: Any = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    built = {Path(path).resolve() for *_, path in build.find_all_modules()}
    built |= {
        (Path(source) / name).resolve()
        for _, source, _, names in build.data_files
        for name in names
    }
    files = {
        path
        for path in PACKAGE.rglob("*.*")
        if "__pycache__" not in path.parts and path.suffix not in COMPILED
    }
    assert PACKAGE / "default.yaml" in files
    assert files - built == set(), "no wheel would have these"
