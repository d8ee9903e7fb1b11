"""How tests are collected and shared out to several processes (`pytest -n 3`), and an option."""

import atexit
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest

_STATE = tempfile.mkdtemp(prefix="dllm-state-")
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)
os.environ["DLLM_STATE"] = _STATE  # keys of tests are not among those of whoever runs them
os.environ["DLLM_CACHE"] = os.path.join(_STATE, "cache")  # and so it is with weights
os.environ["DLLM_KERNELS"] = "usual"  # the same ones in every run: nothing is measured

# Bytecode is kept even where the environment says not to: without it, each of the hundreds of
# processes that tests start compiles this package anew, and pytest rewrites all asserts anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Jobs that a shell starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise those of nohup, and that a terminal was closed.
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("suite", deadline=None)  # other programs slow tests down
hypothesis.settings.load_profile("suite")

_OF_PROCESSES = ("tests/api/", "tests/chaos/", "tests/cluster/")
"""Folders whose tests start processes and mostly wait for them."""

_NICENESS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make chaos` try more random schedules than every run of the suite does."""
    parser.addoption(
        "--schedules",
        type=int,
        help="random schedules of each kind in test_core_random, other ones each time; "
        "test_clusters tries every type of model once",
    )


@pytest.fixture(autouse=True)
def log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `caplog` hear this package, whatever earlier tests ran in this process.

    Commands configure its log, and import-linter disables all logs that it does not know.
    """
    monkeypatch.setattr(logging.getLogger("distributed_llm"), "propagate", True)
    for name, one in logging.root.manager.loggerDict.items():
        if name.startswith("distributed_llm") and isinstance(one, logging.Logger):
            one.disabled = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage among modules that are imported and tests that are made.

    There is none, and looking for it takes as long as all the rest; later it would take time too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give many schedules as much time as they take."""
    for item in items if config.getoption("--schedules") else ():
        item.add_marker(pytest.mark.timeout(0), append=False)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Let tests that compute give way to those of processes, which look at the time.

    On two cores there are three processes of tests: one of them mostly waits, and now and then
    another one does.
    """
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    if beside_others and not nodeid.startswith(_OF_PROCESSES) and hasattr(os, "nice"):
        os.nice(max(0, _NICENESS - os.nice(0)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run all tests that wait, beside those that compute; the others go by file.

    Groups (`--dist loadgroup`) would say the same, but pytest 9.2 does not tell them to xdist 3.8.
    """
    config.option.loadscopereorder = False  # by the order of folders, the longest group is first
    scheduler = importlib.import_module("xdist.scheduler").LoadScopeScheduling(config, log)
    scheduler._split_scope = _group
    return scheduler


def _group(test: str) -> str:
    return "processes" if test.startswith(_OF_PROCESSES) else test.partition("::")[0]
