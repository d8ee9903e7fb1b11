"""`dllm up`: a coordinator and a worker on this machine, and what others need to join them."""
