"""The model that is served, and the names by which requests may ask for it."""

from distributed_llm.api.errors import unknown_model

DEFAULT = "default"
"""Name of whichever model is served."""


def check_model(asked: str, served: str) -> None:
    """Check that a request asks for the model that is served.

    Besides its name, the last part of it will do, and "default".

    Raises:
        ApiError: it asks for another one.
    """
    if asked not in names_of(served):
        raise unknown_model(asked, served)


def names_of(served: str) -> tuple[str, ...]:
    """Return the names by which a model may be asked for, its own first."""
    return (served, served.rstrip("/").rpartition("/")[2], DEFAULT)
