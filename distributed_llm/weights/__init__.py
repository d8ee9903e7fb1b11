"""The weights of a model on their way to a disk: cache, fetching, serving."""
