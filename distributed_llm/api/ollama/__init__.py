"""Ollama's API: Open WebUI, and whatever looks for a server on port 11434."""
