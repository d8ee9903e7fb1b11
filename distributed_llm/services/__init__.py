"""Services that run a verb of `dllm` in the background, from the start of a machine on.

Which files and commands that takes is pure, for each system in a module of its own; `perform`
writes and runs them. These modules need Python alone, so that a service can be removed although the
package is not installed any more: `python -m distributed_llm.services remove worker`.
"""
