"""Run one language model on several machines, each too small for it alone."""
