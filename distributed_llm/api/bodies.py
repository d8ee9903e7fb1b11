"""Reads the bodies of requests: strict JSON, checked by a model; wrong fields are named."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, Self

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from distributed_llm.api.errors import ApiError, invalid

_MAX_TOLD = 200
"""Characters of a wrong value that are told."""

_MOST_ERRORS = 100
"""Wrong values of a body that are looked at one by one; the first is told."""


class Body(BaseModel):
    """A request's body. Fields that it does not know are ignored, and told in a header.

    Numbers are finite, and nothing is taken for a number, text or truth value that is none.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _bound_errors(cls, value: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Read a body; of very many wrong fields tell the number, for to list them takes long."""
        try:
            return read(value)
        except ValidationError as exc:
            if exc.error_count() <= _MOST_ERRORS:
                raise
            raise PydanticCustomError(
                "too_many_errors", "{count} of its values are wrong", {"count": exc.error_count()}
            ) from None


class Part(BaseModel):
    """A part of a body, as strict as that; fields that it does not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


WARNING = "x-dllm-warning"
"""Header that says what of a request was ignored."""


def warning_headers(body: Body, known: Collection[str] = ()) -> dict[str, str]:
    """Return the header that names the fields of a body that are not known here; maybe none.

    Args:
        known: fields that are, besides those of the body's class.
    """
    return warning("fields", [name for name in body.model_extra or () if name not in known])


def warning(of_what: str, names: Iterable[str]) -> dict[str, str]:
    """Return the header that names what is ignored, as far as a header may have it; maybe none.

    Args:
        of_what: kind of what is ignored: "fields".
    """
    told = ", ".join(name for name in names if name.isascii() and name.isprintable())
    told = told[:_MAX_TOLD].strip()  # HTTP lets no value end with a space
    return {WARNING: f"ignored unknown {of_what}: {told}"} if told else {}


class StrictRequest(Request):
    """A request whose JSON is read as the standard says."""

    async def json(self) -> Any:
        """Return the body's JSON.

        Raises:
            ApiError: it is no JSON: also NaN, names that stand twice, or nesting without end.
        """
        return parse_json(await self.body())


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""May be half of a character; two of them that belong together are one."""


def parse_json(data: bytes) -> Any:
    """Return JSON as Python values.

    Raises:
        ApiError: it is no JSON: also NaN, names that stand twice, nesting without end, or halves of
            characters.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise invalid("The body's JSON is nested too deeply.") from None
    except ValueError as exc:
        raise invalid(f"The body is not valid JSON: {exc}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name in counts if counts[name] > 1)
        raise ValueError(f"the name {twice!r:.60} stands twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


class StrictRoute(APIRoute):
    """A route that reads bodies as `StrictRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles requests of this route."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            try:
                return await handle(StrictRequest(request.scope, request.receive))
            except HTTPException as exc:
                if isinstance(exc.__cause__, ApiError):  # FastAPI hides what is wrong with a body
                    raise exc.__cause__ from None
                raise

        return strictly


def invalid_body(error: RequestValidationError) -> ApiError:
    """Return the error of a body or query that its model refuses: the first field that is wrong."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(str(part) for part in place) or None
    what = str(first["msg"])
    if param is None:
        return invalid(
            f"The body is wrong: {what}. Send a JSON object, with Content-Type: application/json."
        )
    value = repr(first.get("input"))[:_MAX_TOLD]
    if first["type"] == "missing":
        return invalid(f"The field {param!r} is missing.", param, "missing_required_parameter")
    return invalid(f"The field {param!r} is wrong: {what}, not {value}.", param, "invalid_value")
