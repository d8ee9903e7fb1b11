"""The HTTP API: a client of the coordinator, for whoever speaks OpenAI, Anthropic or Ollama."""
