"""Writes the texts and the list of tensors of a model in GGUF files to a folder.

Arguments: the folder, then the files, the first of which has the metadata. If they cannot be
served, the folder gets `REFUSAL_NAME` with the reason instead.
"""

import sys
from pathlib import Path

_MAX_MEMORY_BYTES = 8 << 30
"""Memory that this process may take: a file can claim any number of fields."""


def main() -> None:
    """Do what the module says."""
    out, *files = map(Path, sys.argv[1:])
    _limit_memory()
    from distributed_llm.gguf_texts.texts import write_texts_or_refusal  # within the limit

    write_texts_or_refusal(files, out)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))


main()
