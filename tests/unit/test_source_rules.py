"""Rules that the source keeps, read off its syntax tree: nothing that comes in is ever executed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
FOLDERS = ("distributed_llm", "benchmarks", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "__import__"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized"}
MEMBERS = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
    ("os", "popen"),
}
FLAGS = {"allow_pickle", "trust_remote_code", "shell"}
ONLY_ZMQ = ROOT / "distributed_llm/common/transport"


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the module and the name ("" for the module itself) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name


def violations(source: str) -> list[str]:
    """Return what `source` does that it may not, with the line."""
    tree = ast.parse(source)
    breaches = []
    modules: dict[str, str] = {}  # by the name it goes by in this file
    for line, module, name in imported(tree):
        if module.partition(".")[0] in MODULES:
            breaches.append(f"{line}: imports {module}")
        if (module, name) in MEMBERS:
            breaches.append(f"{line}: imports {module}.{name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                breaches.append(f"{node.lineno}: calls {name}")
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in CALLS:
                breaches.append(f"{node.lineno}: calls builtins.{name}")
            case ast.Attribute(attr=name) if name in ATTRIBUTES:
                breaches.append(f"{node.lineno}: uses {name}")
            case ast.Attribute(value=ast.Name(id=base), attr=name):
                if (modules.get(base, base), name) in MEMBERS:
                    breaches.append(f"{node.lineno}: uses {modules.get(base, base)}.{name}")
        if isinstance(node, ast.Call):
            breaches += [
                f"{node.lineno}: passes {keyword.arg}"
                for keyword in node.keywords
                if keyword.arg in FLAGS
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    return breaches


def test_there_is_source_to_check() -> None:
    names = {path.name for path in SOURCES}
    assert {"router.py", "codec.py", "engine.py", "cli.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_forbidden_is_used(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "distributed_llm")]
"""Benchmarks may use it, to compare with."""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_transport_imports_zmq(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    uses = any(module.partition(".")[0] == "zmq" for _, module, _ in imported(tree))
    assert path.is_relative_to(ONLY_ZMQ) or not uses


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, pickle",
        "def f():\n    import cloudpickle",
        "import dill",
        "import marshal",
        "import shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch\nf = torch.load",
        "socket.recv_pyobj()",
        "self._socket.send_pyobj(x)",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pickle')",
        "import yaml\nyaml.load(x)",
        "from yaml import load",
        "import yaml\nyaml.unsafe_load(x)",
        "np.load(x, allow_pickle=True)",
        "np.load(x, allow_pickle=flag)",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
    ],
)
def test_the_checker_finds(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json",
        "model.eval()",
        "self.load(x)",
        "import yaml\nyaml.safe_load(x)",
        "np.load(x, allow_pickle=False)",
        "AutoConfig.from_pretrained(x, trust_remote_code=False)",
        "subprocess.run(['ls'], shell=False)",
        "import re\nre.compile('x')",
        "'import pickle'",
        "# eval('1')",
    ],
)
def test_the_checker_lets_pass(source: str) -> None:
    assert violations(source) == []


# ------------------------------------------------------------------ who may import what

COORDINATOR = "distributed_llm.coordinator"
MATHEMATICS = {
    *("bisect", "collections.abc", "dataclasses", "functools", "itertools", "math", "typing"),
    *("numpy", "numpy.typing", "numpy.lib.stride_tricks"),
    "distributed_llm.common.types",
    "distributed_llm.common.offloading",
    *(f"{COORDINATOR}.{name}" for name in ("model_cost", "partition", "plan")),
}
"""What `coordinator/partition` may import."""


def test_the_partition_is_mathematics_only() -> None:
    folder = ROOT / "distributed_llm/coordinator/partition"
    modules = {
        module
        for path in folder.glob("*.py")
        for _, module, _ in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
    own = {module for module in modules if module.startswith(f"{COORDINATOR}.partition.")}
    assert modules - own <= MATHEMATICS
    assert f"{COORDINATOR}.plan" in modules, "imports are found"


def test_rooms_import_only_what_stands_below_them() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
