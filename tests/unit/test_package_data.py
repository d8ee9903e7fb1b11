"""What goes into a wheel: all of the package, with the files that are no modules."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distributed_llm.worker.model.kernels.native import library

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distributed_llm"
COMPILED = {".c", ".h", ".so"}
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


def test_a_wheel_is_for_one_platform_and_any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library is loaded by ctypes, from the file that every system has it in."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["setup.py"])
    run_setup: Any = import_module("distutils.core").run_setup
    distribution = run_setup("setup.py", stop_after="init")
    commands = {name: distribution.get_command_obj(name) for name in ("bdist_wheel", "build_ext")}
    for command in commands.values():
        command.ensure_finalized()
    python, interface, platform = commands["bdist_wheel"].get_tag()
    assert (python, interface) == ("py3", "none")
    assert platform != "any"
    (extension,) = distribution.ext_modules
    built = Path(commands["build_ext"].get_ext_filename(extension.name))
    assert ROOT / built == library._FILE
    assert commands["build_ext"].get_export_symbols(extension) == []


@pytest.mark.parametrize(
    ("compiler", "flags"), [("msvc", {"/std:c11", "/O2"}), ("unix", {"-std=c11", "-O3"})]
)
def test_compilers_are_given_flags_that_they_know(
    compiler: str, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["setup.py"])
    distribution = import_module("distutils.core").run_setup("setup.py", stop_after="init")
    build = distribution.get_command_obj("build_ext")
    build.compiler = SimpleNamespace(compiler_type=compiler)
    (extension,) = distribution.ext_modules
    parent: Any = type(build).__mro__[1]
    monkeypatch.setattr(parent, "build_extension", lambda self, ext: None)
    build.build_extension(extension)
    given = extension.extra_compile_args
    assert flags <= set(given)
    assert {flag[0] for flag in given} == {min(flags)[0]}
