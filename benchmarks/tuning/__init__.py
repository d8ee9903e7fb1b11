"""What `benchmark.py` is made of: what is tried, how it is measured or predicted, what is best."""
