"""Bodies of requests that are wrong in very many places are refused as quickly as others."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from distributed_llm.api.bodies import Body, parse_json
from distributed_llm.api.errors import ApiError

MANY = 100_000


class Texts(Body):
    texts: list[str]
    by_name: dict[str, str] | None = None


@pytest.mark.timeout(10)
def test_of_many_names_the_one_that_stands_twice_is_told() -> None:
    names = ",".join(f'"n{number}":1' for number in range(MANY))
    with pytest.raises(ApiError, match=f"'n{MANY - 1}' stands twice"):
        parse_json(f'{{{names},"n{MANY - 1}":2}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        {"texts": [0] * MANY},
        {"texts": [], "by_name": {str(number): number for number in range(MANY)}},
    ],
)
def test_very_many_wrong_values_are_not_listed(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        Texts.model_validate(body)
    (error,) = raised.value.errors()
    assert error["msg"] == f"{MANY} of its values are wrong"


def test_a_few_wrong_values_are_told_by_their_places() -> None:
    with pytest.raises(ValidationError) as raised:
        Texts.model_validate(json.loads('{"texts": ["a", 1, 2]}'))
    assert [error["loc"] for error in raised.value.errors()] == [("texts", 1), ("texts", 2)]
    assert Texts(texts=["a"]).texts == ["a"]
