"""Measurements; each script prints a Markdown table for docs/performance.md."""
