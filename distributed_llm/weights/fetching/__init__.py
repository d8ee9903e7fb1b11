"""Fetching tensors from several sources at once: decisions only; `fetch` is its edge."""
