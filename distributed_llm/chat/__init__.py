"""`dllm chat`: a conversation at a terminal."""
