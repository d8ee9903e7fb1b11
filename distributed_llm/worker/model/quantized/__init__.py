"""Weights of integers with scales: read from files, made, and computed with."""
