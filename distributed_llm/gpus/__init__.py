"""A worker for each GPU of this machine, where `dllm worker` finds several."""
