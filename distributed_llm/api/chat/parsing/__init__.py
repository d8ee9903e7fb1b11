"""The text of an answer, piece by piece, taken apart: reasoning, text, calls of tools."""
