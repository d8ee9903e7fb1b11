"""The client: prompts in, text out."""
