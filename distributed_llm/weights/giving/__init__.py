"""Giving weights to other machines: what there is, what it hashes to, and sending it."""
