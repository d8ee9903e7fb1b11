"""The routes of the API, dialect by dialect."""

from distributed_llm.api import process
from distributed_llm.api.anthropic import messages
from distributed_llm.api.anthropic import models as anthropic_models
from distributed_llm.api.ollama import answers as ollama_answers
from distributed_llm.api.ollama import embeddings as ollama_embeddings
from distributed_llm.api.ollama import models as ollama_models
from distributed_llm.api.openai import chat, completions, embeddings, models, tokens
from distributed_llm.api.openai.responses import routes as responses
from distributed_llm.api.operations import administration, cluster, health, metrics, requests

ROUTERS = (
    anthropic_models.router,
    models.router,
    chat.router,
    completions.router,
    embeddings.router,
    tokens.router,
    ollama_answers.router,
    ollama_embeddings.router,
    ollama_models.router,
    process.router,
    responses.router,
    messages.router,
    health.router,
    cluster.router,
    requests.router,
    metrics.router,
    administration.router,
)
