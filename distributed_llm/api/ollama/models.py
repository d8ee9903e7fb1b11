"""What Ollama's clients ask about models; there is one, and it is chosen where it is served."""

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter

from distributed_llm.api.asking import Asking
from distributed_llm.api.bodies import StrictRoute
from distributed_llm.api.chat.served import served_model
from distributed_llm.api.errors import invalid
from distributed_llm.api.ollama.bodies import ModelBody
from distributed_llm.api.ollama.names import check_name, digest_of, listed_name
from distributed_llm.common.messages import ModelInfo

router = APIRouter(route_class=StrictRoute)

_LEVEL = "0.13.5"
"""Version of Ollama whose API is spoken: clients look at it to know what they may ask for."""

_STARTED = datetime.now(UTC)

_FOR_EVER = timedelta(days=365 * 100)


@router.get("/api/version")
async def version(caller: Asking) -> dict[str, str]:
    """Return the version of Ollama whose API is spoken."""
    return {"version": _LEVEL}


@router.get("/api/tags")
async def tags(caller: Asking) -> dict[str, Any]:
    """Return the models that can be asked for."""
    return {"models": [_listed(await caller.client.model())]}


@router.get("/api/ps")
async def running(caller: Asking) -> dict[str, Any]:
    """Return the models that are loaded."""
    model = await caller.client.model()
    told = {
        **_listed(model),
        "expires_at": (_STARTED + _FOR_EVER).isoformat(),
        "size_vram": model.weight_bytes,
        "context_length": model.context_length,
    }
    return {"models": [told]}


@router.post("/api/show")
async def show(body: ModelBody, caller: Asking) -> dict[str, Any]:
    """Return what is known of a model."""
    served = await served_model(caller.client)
    check_name(body.asked_model, served.name)
    model = await caller.client.model()
    capabilities = ["completion"]
    if served.formats.calls_tools:
        capabilities.append("tools")
    if served.formats.reasoning:
        capabilities.append("thinking")
    kind = model.model_type
    return {
        "modelfile": f"FROM {listed_name(model.name)}\n",
        "parameters": "",
        "template": served.template,
        "details": _details(model),
        "model_info": {
            "general.architecture": kind,
            "general.parameter_count": model.num_parameters,
            f"{kind}.block_count": model.num_layers,
            f"{kind}.context_length": model.context_length,
            f"{kind}.embedding_length": model.hidden_size,
            f"{kind}.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": _STARTED.isoformat(),
    }


@router.post("/api/pull")
async def pull(body: ModelBody, caller: Asking) -> dict[str, str]:
    """Say that the served model is here; others cannot be fetched."""
    check_name(body.asked_model, (await caller.client.identity()).model)
    return {"status": "success"}


async def _change(caller: Asking) -> None:
    """Refuse to change models."""
    raise invalid(
        "A cluster serves the model that it was started with; models are not made, copied, sent "
        "or deleted by its API. `dllm coordinator MODEL` serves another one."
    )


for _method, _path in (
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("POST", "/api/push"),
    ("DELETE", "/api/delete"),
):
    router.add_api_route(_path, _change, methods=[_method])


def _listed(model: ModelInfo) -> dict[str, Any]:
    name = listed_name(model.name)
    return {
        "name": name,
        "model": name,
        "modified_at": _STARTED.isoformat(),
        "size": model.weight_bytes,
        "digest": digest_of(model.name),
        "details": _details(model),
    }


def _details(model: ModelInfo) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": model.model_type,
        "families": [model.model_type],
        "parameter_size": _size(model.num_parameters),
        "quantization_level": model.dtype,
    }


def _size(parameters: int) -> str:
    """Return a number of parameters as names of models have it: "7.6B"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{name}"
    return str(parameters)
