"""How tests are shared out when several processes run them (`pytest -n 2 --dist loadgroup`)."""

import pytest

_OF_PROCESSES = {"cluster", "chaos"}
"""Folders whose tests start processes and mostly wait for them."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests that wait, beside those that compute; the others go by file."""
    for item in items:
        waits = item.path.parent.name in _OF_PROCESSES
        item.add_marker(pytest.mark.xdist_group("processes" if waits else item.path.name))
