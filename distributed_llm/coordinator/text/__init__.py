"""Prompts become token ids, and the tokens of answers text, in a process beside the coordinator."""
