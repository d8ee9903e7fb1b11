"""Decode steps of a GPU that are recorded as graphs, by how many sequences they have.

Launching the kernels of a step one by one takes the CPU longer than a GPU takes to compute them for
a few tokens. A graph of all of them is launched at once; it computes the same kernels on the same
memory each time, so all that differs from step to step lies in memory that is filled before.
"""
