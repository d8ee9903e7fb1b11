"""The worker: holds a range of layers with their KV cache and runs the tasks it pulls."""
