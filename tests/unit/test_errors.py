"""The tree of errors: it is what its drawing says, and every error survives the wire."""

import inspect
import re

import pytest

from distributed_llm.common import errors
from distributed_llm.common.errors import DistributedLLMError, Overloaded, error_from_wire

LOCAL = {
    "AddressInUse",
    "ConnectionFailed",
    "LocalProtocolError",
    "OutputFailed",
    "ProtocolError",
    "ServiceFailed",
}
"""Errors that never leave the process they happen in, so that no message names them."""

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, DistributedLLMError)
]


def made(kind: type[DistributedLLMError]) -> DistributedLLMError:
    if kind is errors.RemoteProtocolError:
        return errors.RemoteProtocolError("bad_field", "what")
    return kind("what")


def drawn() -> dict[str, str]:
    """Parent by child, as the module's docstring draws them."""
    parents: dict[str, str] = {}
    path: list[str] = []
    assert errors.__doc__
    for line in errors.__doc__.splitlines():
        if match := re.match(r"( *)[*x+] (\w+)", line):
            depth = len(match[1]) // 2
            path[depth:] = [match[2]]
            if depth:
                parents[match[2]] = path[depth - 1]
    return parents


def test_the_tree_is_the_one_that_is_drawn() -> None:
    real = {
        kind.__name__: kind.__bases__[0].__name__
        for kind in CLASSES
        if kind is not DistributedLLMError
    }
    assert drawn() == real
    assert all(len(kind.__bases__) == 1 for kind in CLASSES)


def test_codes_are_unique_and_plain() -> None:
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)
    for kind in CLASSES:
        assert "code" in vars(kind), f"{kind.__name__} inherits its code"
        assert re.fullmatch(r"[a-z_]{1,64}", kind.code)


def test_exit_codes_are_few() -> None:
    assert {kind.exit_code for kind in CLASSES} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_from_the_wire(kind: type[DistributedLLMError]) -> None:
    sent = made(kind)
    got = error_from_wire(sent.code, str(sent), 0.0)
    if kind.__name__ in LOCAL or kind is errors.RemoteProtocolError:
        assert type(got) is DistributedLLMError
    else:
        assert type(got) is kind
    assert str(got) == str(sent)


def test_overload_says_when_to_try_again() -> None:
    got = error_from_wire("overloaded", "full", 2.5)
    assert isinstance(got, Overloaded)
    assert got.retry_after_s == 2.5
    assert Overloaded("full").retry_after_s == 1.0


@pytest.mark.parametrize("code", ["", "no_such_code", "Overloaded", "__class__"])
def test_an_unknown_code_gives_the_base_class(code: str) -> None:
    got = error_from_wire(code, "what", 0.0)
    assert type(got) is DistributedLLMError
    assert str(got) == "what"


def test_a_refusal_names_its_reason() -> None:
    error = errors.RemoteProtocolError("bad_field", "at `$.epoch`")
    assert error.reason == "bad_field"
    assert str(error) == "bad_field: at `$.epoch`"
