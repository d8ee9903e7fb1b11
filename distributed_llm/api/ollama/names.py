"""Names of models as Ollama has them: with a tag. Pure."""

import hashlib

from distributed_llm.api.models import check_model

_LATEST = ":latest"


def listed_name(served: str) -> str:
    """Return how the served model is listed: an id of the hub, or the folder's own name."""
    is_folder = served.startswith(("/", ".", "~"))
    name = served.rstrip("/").rpartition("/")[2] if is_folder else served
    return name if ":" in name else name + _LATEST


def check_name(asked: str, served: str) -> None:
    """Check that a request asks for the model that is served, whatever its tag.

    Raises:
        ApiError: it asks for another one.
    """
    check_model(asked.removesuffix(_LATEST), served)


def digest_of(name: str) -> str:
    """Return what stands for a model where Ollama has a digest of its file."""
    return hashlib.sha256(name.encode()).hexdigest()
