"""A worker: a machine that runs some of a model's layers for a coordinator.

`work` starts it, `service` and `links` are its edges, and the rooms are, from top to bottom,
`compute`, `model`, `session` and `kv`. Imports point downwards only; pyproject.toml holds them so.
"""
