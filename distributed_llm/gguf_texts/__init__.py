"""Writes what a folder of a model holds beside its weights, from the metadata of GGUF files.

A process of its own: `python -m distributed_llm.gguf_texts OUT FILE...`. It reads with
transformers' own readers, which need torch, and files that may be made to harm; the coordinator
needs neither. It ends when the files are written. `common/gguf_files.py` starts it.
"""
