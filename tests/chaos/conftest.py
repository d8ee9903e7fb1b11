"""Clusters that are hurt."""

from tests.warm import warm_workers

__all__ = ["warm_workers"]
